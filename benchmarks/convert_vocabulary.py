"""A Gemma GGUF's vocabulary as the files its Hugging Face folder had: tokenizer.json, and tokenizer.model beside it.

llama.cpp's converter reads Gemma's pieces from tokenizer.model; Deskside and transformers read tokenizer.json.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.gguf.header import Header

from .errors import BadWorkload

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_BPE = 2


@dataclass(frozen=True)
class Pieces:
    """The vocabulary in SentencePiece's terms, by token id."""

    texts: list[str]
    scores: list[float]
    kinds: list[int]
    bos: int
    eos: int
    unknown: int
    pad: int

    def named(self, *ids: int) -> list[str]:
        """The texts of some tokens."""
        return [self.texts[index] for index in ids]


def read_pieces(header: Header) -> Pieces:
    """The pieces of a GGUF's vocabulary. Raises BadWorkload when it is not of SentencePiece's kind."""
    fields = header.fields
    if header.text("tokenizer.ggml.model") != "llama":
        raise BadWorkload(f"{str(header.path)!r} has no SentencePiece vocabulary")
    texts = [text.decode() for text in fields["tokenizer.ggml.tokens"].strings or []]
    kinds = [int(kind) for kind in fields["tokenizer.ggml.token_type"].numbers or ()]
    # a GGUF spells white space in tokens of the user's own as it is
    texts = [text.replace(" ", "▁") if kind == USER_DEFINED else text for text, kind in zip(texts, kinds, strict=True)]
    ids = [header.integer(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "unknown", "padding")]
    return Pieces(texts, [float(score) for score in fields["tokenizer.ggml.scores"].numbers or ()], kinds, *ids)


def write_vocabulary(folder: Path, pieces: Pieces) -> None:
    """Write the tokenizer's three files into `folder`."""
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json(pieces), ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(pieces))
    bos, eos, unknown, pad = pieces.named(pieces.bos, pieces.eos, pieces.unknown, pieces.pad)
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unknown,
        "tokenizer_class": "GemmaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _tokenizer_json(pieces: Pieces) -> dict[str, Any]:
    added = [
        {"id": index, "content": text, "special": kind != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, (text, kind) in enumerate(zip(pieces.texts, pieces.kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    bos, unknown = pieces.named(pieces.bos, pieces.unknown)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, one],
            "pair": [start, one, {"SpecialToken": {"id": bos, "type_id": 1}}, two],
            "special_tokens": {bos: {"id": bos, "ids": [pieces.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: index for index, text in enumerate(pieces.texts)},
            "merges": [[left, right] for left, right in merges(pieces)],
        },
    }


def merges(pieces: Pieces) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two others, in the order SentencePiece would: the best score first.

    Pieces of the user's own, runs of white space in Gemma, come before all: SentencePiece never cuts them.
    """
    ids = {text: index for index, text in enumerate(pieces.texts) if pieces.kinds[index] in (NORMAL, USER_DEFINED)}
    found = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                own = pieces.kinds[index] == USER_DEFINED
                found.append((0.0 if own else -pieces.scores[index], left, right))
    for _, left, right in sorted(found):
        yield pieces.texts[left], pieces.texts[right]


def _sentencepiece_model(pieces: Pieces) -> bytes:
    """A ModelProto (sentencepiece_model.proto): field 1 is a piece, 2 the trainer's settings, 3 the normalizer's."""
    model = bytearray()
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        piece = _bytes(1, text.encode()) + _tag(2, 5) + struct.pack("<f", score) + _integer(3, kind)
        model += _bytes(1, piece)
    trainer = _integer(3, _BPE) + _integer(4, len(pieces.texts)) + _integer(35, True)  # with byte fallback
    special = (pieces.unknown, pieces.bos, pieces.eos, pieces.pad)
    for number, index in enumerate(special):
        trainer += _integer(40 + number, index) + _bytes(45 + number, pieces.texts[index].encode())
    model += _bytes(2, trainer)
    # no dummy prefix, white space is kept and escaped
    normalizer = _bytes(1, b"identity") + _integer(3, False) + _integer(4, False) + _integer(5, True)
    return bytes(model + _bytes(3, normalizer))


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _integer(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
