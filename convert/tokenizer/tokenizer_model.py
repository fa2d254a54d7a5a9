"""Read tokenizer.model, SentencePiece's own file, in llama.cpp's terms.

The protocol buffer is read here, not by `sentencepiece_model_pb2`: every error names the byte, field or token at fault,
lengths are checked against the rest of the file before anything is read, and the `protobuf` package, which the
`sentencepiece` library does not install, is not needed. The library itself exposes neither the normalizer's settings
nor which pieces are user-defined; it remains the independent judge of the result, in `proof.reference`.
Fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.errors import TokenizerInvalid

from .pieces import (
    MAX_TOKENS,
    AddedToken,
    ParsedTokenizer,
    Piece,
    TokenizerKind,
    TokenType,
    added_piece,
    is_id,
    part,
    read_bytes,
    read_object,
)
from .spacing import checked_charsmap

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_KINDS: Mapping[int, TokenType] = {kind.value: kind for kind in TokenType}
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_MODEL_TYPE, _SUFFIX_MARKS, _BYTE_FALLBACK = 3, 24, 35  # of TrainerSpec
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE = 2, 3, 4, 5  # of NormalizerSpec
_UNIGRAM, _BPE = 1, 2  # model types
_ADDED_SCORE = -1000.0

ProtobufValue = int | bytes


def read_protobuf(file: Path) -> ParsedTokenizer:
    """Read the tokenizer in `file`, with the added tokens of its folder. Raises TokenizerInvalid naming the fault."""
    source = repr(str(file))
    trainer: dict[int, ProtobufValue] = {}
    normalizer: dict[int, ProtobufValue] = {}
    texts: dict[int, str] = {}
    odd: dict[int, Piece] = {}
    scores: list[float] = []
    for number, value in _fields(read_bytes(file), source):
        if number == _PIECES:
            if (index := len(texts)) >= MAX_TOKENS:
                raise TokenizerInvalid(f"{source} has more than {MAX_TOKENS} tokens")
            piece = _piece(_message(value, source), index, source)
            texts[index] = piece.text
            scores.append(piece.score)
            if piece.kind is not TokenType.NORMAL:
                odd[index] = piece
        elif number in {_TRAINER, _NORMALIZER}:
            (trainer if number == _TRAINER else normalizer).update(_message(value, source))
    if texts and not (trainer and normalizer):
        raise TokenizerInvalid(f"{source} is truncated: it does not say how it was trained and how it normalizes text")
    added = added_in_folder(file.parent)
    parsed = _settled(
        ParsedTokenizer(TokenizerKind.UNIGRAM, "default", texts, odd, np.array(scores, np.float32), added=added),
        trainer,
        normalizer,
        source,
    )
    unknown = {index for index, piece in odd.items() if piece.kind is TokenType.UNKNOWN}
    added_pieces = {token.id: added_piece(token, _ADDED_SCORE, unknown=token.id in unknown) for token in added}
    return replace(parsed, odd=odd | added_pieces)


def added_in_folder(folder: Path) -> tuple[AddedToken, ...]:
    """The added tokens beside a tokenizer.model, by id: from added_tokens.json, then from tokenizer_config.json."""
    file = folder / "added_tokens.json"
    found = {index: AddedToken(index, text, special=False) for text, index in read_object(file).items() if is_id(index)}
    for number, entry in part(read_object(folder / "tokenizer_config.json"), "added_tokens_decoder").items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not number.isdecimal() or not isinstance(text, str) or not text or int(number) > MAX_TOKENS:
            raise TokenizerInvalid(f"{str(folder)!r}: tokenizer_config.json has the added token {number!r}: {entry!r}")
        flags = (bool(entry.get(key)) for key in ("special", "normalized", "lstrip", "rstrip", "single_word"))
        found[int(number)] = AddedToken(int(number), text, *flags)
    return tuple(found[index] for index in sorted(found))


def _settled(
    parsed: ParsedTokenizer, trainer: Mapping[int, ProtobufValue], normalizer: Mapping[int, ProtobufValue], source: str
) -> ParsedTokenizer:
    """`parsed` with its kind and its treatment of spaces from the file's settings. Raises TokenizerInvalid."""
    kind, prefix, removes = (
        trainer.get(_MODEL_TYPE, _UNIGRAM),
        bool(normalizer.get(_DUMMY_PREFIX, 1)),
        bool(normalizer.get(_REMOVE_EXTRA, 1)),
    )
    charsmap = normalizer.get(_CHARSMAP, b"")
    if not isinstance(charsmap, bytes):
        raise TokenizerInvalid(f"{source} has a precompiled_charsmap that is a number")
    if not normalizer.get(_ESCAPE, 1) or trainer.get(_SUFFIX_MARKS):
        raise TokenizerInvalid(f"{source} does not write spaces as marks before words, llama.cpp does")
    if kind == _UNIGRAM:
        if trainer.get(_BYTE_FALLBACK):
            raise TokenizerInvalid(f"{source} is a Unigram tokenizer with byte fallback, which llama.cpp lacks")
        charsmap = checked_charsmap(charsmap, source)
        return replace(parsed, add_space_prefix=prefix, remove_extra_whitespaces=removes, charsmap=charsmap)
    if kind != _BPE:
        raise TokenizerInvalid(f"{source} has the model type {kind!r}; known are {_UNIGRAM} (Unigram) and {_BPE} (BPE)")
    if removes or charsmap:
        what = "removes extra white space" if removes else "replaces characters before it splits text"
        raise TokenizerInvalid(f"{source} {what}, which llama.cpp cannot reproduce for BPE")
    n_bytes = sum(piece.kind is TokenType.BYTE for piece in parsed.odd.values())
    if n_bytes != 256:
        raise TokenizerInvalid(f"{source} has {n_bytes} byte tokens, llama.cpp needs all 256")
    return replace(parsed, model=TokenizerKind.SENTENCEPIECE, add_space_prefix=prefix)


def _piece(fields: Mapping[int, ProtobufValue], index: int, source: str) -> Piece:
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0" * 4), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise TokenizerInvalid(f"{source}: token {index} has fields of the wrong type")
    if len(score) != 4 or kind not in _KINDS:
        raise TokenizerInvalid(f"{source}: token {index} has the type {kind} and a score of {len(score)} bytes")
    try:
        spelled = text.decode()
    except UnicodeDecodeError as error:
        raise TokenizerInvalid(f"{source}: token {index} is not UTF-8: {text[:64]!r}") from error
    if kind == TokenType.USER_DEFINED:
        return added_piece(AddedToken(index, spelled, special=False), struct.unpack("<f", score)[0], unknown=False)
    return Piece(spelled, _KINDS[kind], struct.unpack("<f", score)[0])


def _message(value: ProtobufValue, source: str) -> dict[int, ProtobufValue]:
    if not isinstance(value, bytes):
        raise TokenizerInvalid(f"{source} has a number where a message is needed")
    return dict(_fields(value, source))


def _fields(data: bytes, source: str) -> Iterator[tuple[int, ProtobufValue]]:
    """The fields of a message in order: (number, value), varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, source)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, source)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, source)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise TokenizerInvalid(f"{source} is not a SentencePiece model: wire type {wire} before byte {at}")
        if size > len(data) - at:
            raise TokenizerInvalid(f"{source} is truncated: field {number} has {size} bytes, {len(data) - at} are left")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, source: str) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:  # the fast path: nearly all of the two million in a vocabulary
        return data[at], at + 1
    value = 0
    for place, byte in enumerate(data[at : at + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise TokenizerInvalid(f"{source} is not a SentencePiece model: the number at byte {at} does not end")
