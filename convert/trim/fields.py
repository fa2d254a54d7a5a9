"""The vocabulary in a GGUF's fields: read and checked, and written with fewer tokens.

The checks are strict, because llama.cpp aborts the process on some faults (a token listed twice, a byte without a
token).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from convert.errors import TrimImpossible
from convert.tokenizer.pieces import TokenizerKind
from models.gguf.fields import Field
from models.gguf.header import Header

KEPT_FIELD = "deskside.vocabulary.kept_ids"
"""Field of a trimmed file: an int32 array, new id -> id before trimming."""

MAX_TOKEN_BYTES = 4096
_PREFIX = "tokenizer.ggml."
_ID_FIELD = re.compile(r"[\w.-]+_token_id")
_TOKENS, _SCORES, _TYPES, _MERGES = (_PREFIX + name for name in ("tokens", "scores", "token_type", "merges"))
_SUPPRESSED, _ADDED = _PREFIX + "suppress_tokens", _PREFIX + "added_tokens"
# the whole tokenizer.json as one text, which is wrong after trimming
_DROPPED = ("tokenizer.huggingface.json",)


# llama.cpp's special tokens for a file that does not name them
_DEFAULT_IDS: Mapping[TokenizerKind, Mapping[str, int]] = {
    TokenizerKind.SENTENCEPIECE: {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    TokenizerKind.BPE: {"bos_token_id": 11, "eos_token_id": 11},
    TokenizerKind.UNIGRAM: {"eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0},
}


@dataclass(frozen=True)
class GgufVocabulary:
    """Tokens in the order of their ids, their types (int32) and scores (float32, zeros for BPE), and BPE's merges.

    `special_ids`: field -> the id that llama.cpp uses, from the file or its own default.
    """

    model: TokenizerKind
    tokens: Sequence[bytes]
    types: np.ndarray
    scores: np.ndarray
    merges: Sequence[bytes]
    special_ids: Mapping[str, int]

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """Token -> id."""
        return {token: index for index, token in enumerate(self.tokens)}

    def merge_pairs(self) -> Iterator[tuple[bytes, bytes]]:
        """The two parts of each merge, in order; a space may be the first part's first byte."""
        for line in self.merges:
            at = line.find(b" ", 1)
            yield (line[:at], line[at + 1 :]) if at > 0 else (b"", b"")


def read_gguf_vocabulary(header: Header) -> GgufVocabulary:
    """Read a vocabulary and check it. Raises TrimImpossible naming the file and the obstacle."""
    where = repr(str(header.path))
    if KEPT_FIELD in header.fields:
        raise TrimImpossible(f"{where} has a trimmed vocabulary already; trim the file that it was made from")
    model = _model(header, where)
    tokens = _tokens(header, where)
    types = _numbers(header, _TYPES, len(tokens), where).astype(np.int32)
    merges = _strings(header, _MERGES, where) if model == TokenizerKind.BPE else []
    scores = np.zeros(len(tokens), np.float32)
    if model != TokenizerKind.BPE or _SCORES in header.fields:
        scores = _numbers(header, _SCORES, len(tokens), where).astype(np.float32)
    if not np.isfinite(scores).all():
        index = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise TrimImpossible(f"{where}: the score of token {index} is {scores[index]}")
    vocabulary = GgufVocabulary(model, tokens, types, scores, merges, _special_ids(header, model, len(tokens)))
    if model == TokenizerKind.SENTENCEPIECE:
        _require_bytes(vocabulary, where)
    return vocabulary


def trimmed_fields(header: Header, vocabulary: GgufVocabulary, kept: np.ndarray) -> dict[str, Field]:
    """The fields of `header` with only the tokens `kept` (ids, ascending), and with every id in them renumbered."""
    new_ids = {int(old): new for new, old in enumerate(kept)}
    fields = {
        key: field for key, field in header.fields.items() if key not in _DROPPED and not _ID_FIELD.fullmatch(key)
    }
    fields[_TOKENS] = Field.string_array([vocabulary.tokens[index] for index in kept])
    fields[_TYPES] = Field.int32_array(vocabulary.types[kept].tolist())
    if _SCORES in fields:
        fields[_SCORES] = Field.float32_array(vocabulary.scores[kept].tolist())
    if _MERGES in fields:
        fields[_MERGES] = Field.string_array(_kept_merges(vocabulary, new_ids))
    if _ADDED in fields:
        texts = {vocabulary.tokens[index] for index in kept}
        fields[_ADDED] = Field.string_array([text for text in fields[_ADDED].strings or [] if text in texts])
    if _SUPPRESSED in fields:
        suppressed = fields[_SUPPRESSED].numbers or ()
        fields[_SUPPRESSED] = Field.int32_array([new_ids[int(old)] for old in suppressed if int(old) in new_ids])
    fields |= {key: Field.uint32(new_ids[old]) for key, old in vocabulary.special_ids.items()}
    if (size := f"{header.architecture}.vocab_size") in fields:
        fields[size] = Field.uint32(len(kept))
    fields[KEPT_FIELD] = Field.int32_array(kept.tolist())
    return fields


def _kept_merges(vocabulary: GgufVocabulary, new_ids: Mapping[int, int]) -> list[bytes]:
    """The merges of which neither a part nor the result is cut."""
    cut = {token for index, token in enumerate(vocabulary.tokens) if index not in new_ids}
    return [
        line
        for line, (left, right) in zip(vocabulary.merges, vocabulary.merge_pairs(), strict=True)
        if left not in cut and right not in cut and left + right not in cut
    ]


def _model(header: Header, where: str) -> TokenizerKind:
    name = header.text(_PREFIX + "model")
    if name not in {model.value for model in TokenizerKind}:
        known = ", ".join(repr(model.value) for model in TokenizerKind)
        raise TrimImpossible(f"{where} has a tokenizer of model {name!r}; those that can be trimmed are {known}")
    return TokenizerKind(name)


def _tokens(header: Header, where: str) -> list[bytes]:
    found = _strings(header, _TOKENS, where)
    tokens = [token or b"[EMPTY_%d]" % index for index, token in enumerate(found)]  # llama.cpp's name for it
    longest = max(range(len(tokens)), key=lambda index: len(tokens[index]))
    if len(tokens[longest]) > MAX_TOKEN_BYTES:
        raise TrimImpossible(f"{where}: token {longest} has {len(tokens[longest])} bytes, limit {MAX_TOKEN_BYTES}")
    if len(set(tokens)) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if tokens.index(token) != index)
        raise TrimImpossible(f"{where} has the token {twice!r} twice")
    return tokens


def _strings(header: Header, key: str, where: str) -> list[bytes]:
    field = header.fields.get(key)
    strings = field.strings if field is not None else None
    if not strings:
        raise TrimImpossible(f"{where} has no {key!r}: without it a vocabulary of this kind cannot be trimmed")
    return strings


def _numbers(header: Header, key: str, count: int, where: str) -> np.ndarray:
    field = header.fields.get(key)
    numbers = field.numbers if field is not None else None
    if numbers is None:
        raise TrimImpossible(f"{where} has no {key!r}: without it a vocabulary of this kind cannot be trimmed")
    if len(numbers) != count:
        raise TrimImpossible(f"{where} has {len(numbers)} entries of {key!r} for {count} tokens")
    return np.array(numbers)


def _special_ids(header: Header, model: TokenizerKind, n_tokens: int) -> dict[str, int]:
    """The ids that llama.cpp uses: its default replaces an id that is out of range, if that default is in range."""
    found = {_PREFIX + name: index for name, index in _DEFAULT_IDS[model].items()}
    for key, field in header.fields.items():
        if _ID_FIELD.fullmatch(key) and isinstance(field.value, int) and 0 <= field.value < n_tokens:
            found[key] = field.value
    return {key: index for key, index in found.items() if index < n_tokens}


def _require_bytes(vocabulary: GgufVocabulary, where: str) -> None:
    missing = [byte for byte in range(256) if b"<0x%02X>" % byte not in vocabulary.ids]
    if missing:
        message = f"{where} has no token for byte 0x{missing[0]:02X}: the characters that are cut could not be spelled"
        raise TrimImpossible(message)
