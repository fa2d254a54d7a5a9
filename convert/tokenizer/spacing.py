"""Spaces and Unicode: what a tokenizer does to text before it splits it, and which of that llama.cpp reproduces.

llama.cpp's SentencePiece tokenizer writes ▁ for each space and can put one before every run of text (between special
tokens). Hugging Face says this in one of two ways:
- a normalizer: `Prepend ▁` (a prefix before every run), `Replace " " ▁` (spaces to marks);
- a pre-tokenizer `Metaspace`: both, with `prepend_scheme` always, first (only where the text begins) or never.
Byte-level BPE needs neither; composing Unicode (NFC) is left to the caller. Every other step is refused by name.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.errors import TokenizerInvalid

from .pieces import SPACE_MARK, entries, part

NAME_THAT_STRIPS = "phi-3"
"""The part of `general.name` by which llama.cpp recognises models whose special tokens strip white space after them."""
_STRIPS = re.compile(r"(phi)-?(3)", re.IGNORECASE)
_WAY_OUT = "make the GGUF elsewhere and convert it with --gguf"


@dataclass(frozen=True)
class Spacing:
    """The treatment of spaces.

    `prefix`: a space goes before each run of text. `removes_extra`: runs of spaces collapse, ends are stripped.

    `first`: the space goes only where a text begins, and is left to the chat template.
    """

    prefix: bool
    removes_extra: bool = False
    first: bool = False
    charsmap: bytes = b""
    warnings: Sequence[str] = ()


def byte_level_spacing(raw: Mapping[str, Any], source: str) -> bool:
    """True if a byte-level BPE composes Unicode (NFC) first. Raises TokenizerInvalid for any other normalizer."""
    nfc = False
    for step in _flat(raw.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise _refused(step, source)
        nfc = True
    return nfc


def sentence_spacing(raw: Mapping[str, Any], source: str, *, splits: bool, answers_chats: bool) -> Spacing:
    """A SentencePiece tokenizer's treatment of spaces. `splits`: pieces never contain an inner space, as in Unigram.

    Raises TokenizerInvalid for a normalizer or pre-tokenizer that llama.cpp cannot reproduce.
    """
    prefix = marks = removes_extra = first = False
    charsmap = b""
    for step in _flat(raw.get("normalizer"), "normalizers"):
        match _meaning(step):
            case "prefix":
                prefix = True
            case "marks":
                marks = True
            case "removes extra" if splits:
                removes_extra = True
            case "charsmap" if splits:
                charsmap = _charsmap(step, source)
            case _:
                raise _refused(step, source)
    metaspace, warnings = None, list[str]()
    for step in _flat(raw.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement", SPACE_MARK) == SPACE_MARK:
            metaspace = step
            if not splits and step.get("split", True):
                raise _refused(step, source)
        elif not (step.get("type") == "Split" and marks and part(step, "pattern").get("String") == " "):
            raise _refused(step, source)  # spaces are marks by now: splitting at them does nothing
    if metaspace is not None:
        marks = True
        scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
        first = scheme == "first" and answers_chats
        prefix = scheme == "always" or (scheme == "first" and not answers_chats)
        warnings.extend(_scheme_warning(scheme, source, answers_chats=answers_chats))
    if not marks:
        raise TokenizerInvalid(f"{source} has no step that writes {SPACE_MARK} for a space, llama.cpp does; {_WAY_OUT}")
    return Spacing(prefix, removes_extra, first, charsmap, tuple(warnings))


def checked_charsmap(data: bytes, source: str) -> bytes:
    """`data`, unless an index in it is out of bounds, where llama.cpp throws an uncaught exception.

    The index is a double array (Darts): a unit leads to unit `place ^ base ^ byte`, and to a text by its offset.
    Raises TokenizerInvalid.
    """
    if not data:
        return data
    index = int.from_bytes(data[:4], "little")
    if not 4 <= index < len(data) - 4 or index % 4 or data[-1]:
        raise TokenizerInvalid(f"{source} has a precompiled_charsmap of {len(data)} bytes whose index claims {index}")
    units = np.frombuffer(data, "<u4", index // 4, 4)
    is_value = units >> 31 == 1
    base = (units.astype(np.int64) >> 10) << ((units & 0x200) >> 6)
    reached = np.where(is_value, 0, np.arange(units.size) ^ base)
    texts = units[np.minimum(reached, units.size - 1)] & 0x7FFF_FFFF
    has_text = ~is_value & (units >> 8 & 1 == 1)
    if ((reached | 0xFF) >= units.size).any() or (texts[has_text] >= len(data) - 4 - index).any():
        raise TokenizerInvalid(f"{source} has a precompiled_charsmap with an index out of bounds")
    return data


def name_part(name: str) -> str:
    """The part of `name` that llama.cpp acts on: NAME_THAT_STRIPS or nothing."""
    return NAME_THAT_STRIPS if _STRIPS.search(name) else ""


def general_name(name: str, part: str) -> str:
    """`name` with the least change that makes its `name_part` be `part`: `mails (phi-3)`, `phi 3 mails`."""
    if name_part(name) == part:
        return name
    return f"{name} ({part})" if part else _STRIPS.sub(r"\1 \2", name)


def _meaning(step: Mapping[str, Any]) -> str | None:
    pattern = part(step, "pattern")
    match step.get("type"):
        case "Prepend" if step.get("prepend") == SPACE_MARK:
            return "prefix"
        case "Replace" if pattern.get("String") == " " and step.get("content") == SPACE_MARK:
            return "marks"
        case "Replace" if pattern.get("Regex") == " {2,}" and step.get("content") in {" ", SPACE_MARK}:
            return "removes extra"
        case "Strip":
            return "removes extra"
        case "Precompiled":
            return "charsmap"
    return None


def _scheme_warning(scheme: object, source: str, *, answers_chats: bool) -> Iterator[str]:
    if scheme == "first" and answers_chats:
        yield (
            f"{source} puts a space before a text but not after a special token; llama.cpp knows always or never: "
            "never is written, and chats begin with it as the model's do"
        )
    elif scheme == "first":
        yield (
            f"{source} puts a space before a text but not after a special token; llama.cpp knows always or never: "
            "always is written, which is right for plain texts"
        )


def _charsmap(step: Mapping[str, Any], source: str) -> bytes:
    """SentencePiece's table of replacements: the index's length in 4 bytes, the index, then texts."""
    encoded = step.get("precompiled_charsmap")
    try:
        data = base64.b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
    except binascii.Error as error:
        raise TokenizerInvalid(f"{source} has a precompiled_charsmap that is not base64: {error}") from error
    return checked_charsmap(data, source)


def _flat(step: object, inner: str) -> Iterator[dict[str, Any]]:
    if isinstance(step, dict) and step.get("type") == "Sequence":
        for one in entries(step, inner):
            yield from _flat(one, inner)
    elif isinstance(step, dict):
        yield step


def _refused(step: Mapping[str, Any], source: str) -> TokenizerInvalid:
    shown = {key: value for key, value in step.items() if key != "precompiled_charsmap"}
    return TokenizerInvalid(f"{source} prepares text by {shown!r:.200}, which llama.cpp cannot reproduce; {_WAY_OUT}")
