"""Hugging Face's side of the proof: the `tokenizers` library on tokenizer.json, `sentencepiece` on tokenizer.model.

Where llama.cpp is known to differ, of which the tokenizer's reader has warned, texts are changed so that both sides can
agree: composed Unicode, no leading space, a special token before the text. `limits` lists the changes that were needed.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from convert.errors import TokenizerInvalid
from convert.tokenizer.pieces import (
    SPACE_MARK,
    TOKEN_FLAGS,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    TokenizerKind,
    config_tokens,
    read_tokenizer_config,
)
from convert.tokenizer.special import token_text
from convert.tokenizer.tokenizer_model import added_in_folder, read_protobuf

# SentencePiece adds scores up in single precision, llama.cpp in double.
_ROUNDING = 1e-5


class ReferenceTokenizer(Protocol):
    """A tokenizer to compare llama.cpp's with."""

    @property
    def limits(self) -> tuple[str, ...]:
        """The changes made to texts before they are compared, in words."""

    @property
    def knows_special(self) -> bool:
        """True if text after a special token is treated as in llama.cpp."""

    def match_spacing(self, *, space_prefix: bool) -> None:
        """Compare texts as llama.cpp spaces them. `space_prefix`: it puts a space before each run of text."""

    def comparable(self, text: str) -> str:
        """`text`, changed so that both sides can agree on it."""

    @property
    def special(self) -> frozenset[str]:
        """The texts of special and added tokens."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, without added BOS or EOS. `special`: recognise special tokens in it."""

    def equally_good(self, ours: Sequence[int], theirs: Sequence[int]) -> bool:
        """True if `ours` splits the same text differently with an equal score, up to rounding."""

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a whole prompt, its special tokens written out."""

    def encode_whole(self, text: str) -> list[int] | None:
        """The ids of `text` with BOS and EOS as the files add them; None if they do not say."""


def open_reference(folder: Path) -> ReferenceTokenizer:
    """Load the tokenizer of `folder`. Raises TokenizerInvalid."""
    return _TokenizerJson(folder) if (folder / TOKENIZER_JSON).is_file() else _SentencePiece(folder)


class _TokenizerJson:
    """tokenizer.json, read by the library that wrote it."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerInvalid(f"{str(folder / TOKENIZER_JSON)!r} cannot be loaded: {error}") from error
        config = read_tokenizer_config(folder)
        self._add(config)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._composes = "NFC" in {step.get("type") for step in _steps(self._tokenizer.normalizer, "normalizers")}
        splits = _steps(self._tokenizer.pre_tokenizer, "pretokenizers")
        metaspace = [step for step in splits if step["type"] == "Metaspace"]
        self._scheme = metaspace[0].get("prepend_scheme", "always") if metaspace else None
        self._bos = token_text(config.get("bos_token"))
        self._before = ""

    def _add(self, config: Mapping[str, Any]) -> None:
        """Add the tokens of tokenizer_config.json, as transformers does, neighbours of one kind in one call."""
        known = self._tokenizer.get_added_tokens_decoder()
        added = [{"id": at, "content": one.content, **_flags(one)} for at, one in known.items()]
        for special, group in groupby(config_tokens(added, config), lambda entry: bool(entry.get("special"))):
            tokens = [
                tokenizers.AddedToken(entry["content"], **{flag: bool(entry.get(flag)) for flag in TOKEN_FLAGS})
                for entry in group
            ]
            # each call builds the library's search for all of them again
            (self._tokenizer.add_special_tokens if special else self._tokenizer.add_tokens)(tokens)

    def match_spacing(self, *, space_prefix: bool) -> None:
        self._before = self._bos if self._scheme == "first" and not space_prefix else ""

    @property
    def limits(self) -> tuple[str, ...]:
        found = []
        if self._composes:
            found.append("texts are compared in composed form (NFC)")
        if self._scheme in {"always", "first"}:
            found.append("texts are compared without spaces at their beginning")
        if self._before:
            found.append(f"texts are compared as they come after {self._before!r}")
        return tuple(found)

    @property
    def knows_special(self) -> bool:
        return self._scheme != "first" or bool(self._before)

    def comparable(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text) if self._composes else text
        return text.lstrip(" " + SPACE_MARK) if self._scheme in {"always", "first"} else text

    @property
    def special(self) -> frozenset[str]:
        return frozenset(token.content for token in self._tokenizer.get_added_tokens_decoder().values())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        before = 1 if self._before and special else 0
        ids: list[int] = self._tokenizer.encode(self._before * before + text, add_special_tokens=False).ids
        return ids[before:]

    def equally_good(self, ours: Sequence[int], theirs: Sequence[int]) -> bool:
        return ours == theirs

    def encode_rendered(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_whole(self, text: str) -> list[int] | None:
        if self._tokenizer.post_processor is None or self._scheme == "first":
            return None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids


class _SentencePiece:
    """tokenizer.model: added and control tokens are matched first, SentencePiece reads the text between them."""

    knows_special = True

    def __init__(self, folder: Path) -> None:
        file = folder / TOKENIZER_MODEL
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromFile(str(file))
        except (OSError, RuntimeError) as error:
            raise TokenizerInvalid(f"{str(file)!r} cannot be loaded: {error}") from error
        self._is_unigram = read_protobuf(file).model == TokenizerKind.UNIGRAM
        sizes = range(self._processor.GetPieceSize())
        control = (i for i in sizes if self._processor.IsControl(i) or self._processor.IsUnknown(i))
        self._cut = {self._processor.IdToPiece(index): index for index in control}
        self._cut |= {token.text: token.id for token in added_in_folder(folder)}
        longest_first = sorted(map(re.escape, self._cut), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    @property
    def limits(self) -> tuple[str, ...]:
        return ("splits of a text with equal scores count as equal",) if self._is_unigram else ()

    def match_spacing(self, *, space_prefix: bool) -> None:
        """Do nothing: the file itself defines SentencePiece's spaces."""

    def comparable(self, text: str) -> str:
        return text

    @property
    def special(self) -> frozenset[str]:
        return frozenset(self._cut)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        if not special:
            return list(self._processor.EncodeAsIds(text))
        ids: list[int] = []
        for piece in self._pattern.split(text):
            ids += [self._cut[piece]] if piece in self._cut else self._processor.EncodeAsIds(piece)
        return ids

    def equally_good(self, ours: Sequence[int], theirs: Sequence[int]) -> bool:
        known = range(self._processor.GetPieceSize())
        ours, theirs = ([index for index in ids if index in known] for ids in (ours, theirs))
        scores = [sum(map(self._processor.GetScore, ids)) for ids in (ours, theirs)]
        same = self._processor.DecodeIds(ours) == self._processor.DecodeIds(theirs)
        return same and self._is_unigram and math.isclose(*scores, rel_tol=_ROUNDING)

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_whole(self, text: str) -> list[int] | None:
        return None


def _flags(token: tokenizers.AddedToken) -> dict[str, bool]:
    return {flag: getattr(token, flag) for flag in TOKEN_FLAGS}


def _steps(stage: Any, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer as a flat list, each as in tokenizer.json."""
    return _flat(json.loads(stage.__getstate__()), inner) if stage is not None else []


def _flat(step: Mapping[str, Any], inner: str) -> list[Mapping[str, Any]]:
    if step["type"] == "Sequence":
        return [one for nested in step[inner] for one in _flat(nested, inner)]
    return [step]
