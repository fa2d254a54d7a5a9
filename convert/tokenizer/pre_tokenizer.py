"""Recognise the llama.cpp pre-tokenizer of a byte-level BPE by the pattern that splits its text.

The pattern survives fine-tuning; the tokens of a probe text (llama.cpp's own method) do not, once tokens were added.
The names are llama.cpp's: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from convert.errors import TokenizerInvalid

from .pieces import entries, part

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"

# Patterns that split the text, in order -> `ignore_merges` of tokenizer.json -> llama.cpp's name.
_KNOWN: Mapping[tuple[str, ...], Mapping[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (_DIGITS, _GPT2): {False: "smollm"},
    (_WORDS + r"|\p{N}{1,3}" + _TAIL,): {True: "llama-bpe", False: "dbrx"},
    (_WORDS + r"|\p{N}" + _TAIL,): {False: "qwen2"},
    (
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): {False: "qwen35"},
    (_CASED % ("", "") + r"|\p{N}" + _CASED_TAIL,): {True: "tekken"},
    (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_TAIL,): {False: "gpt-4o"},
}
# (name, model type) -> the name that llama.cpp uses for this family, with the same pattern.
_FAMILY_NAMES: Mapping[tuple[str, str], str] = {
    ("smollm", "granite"): "refact",
    ("smollm", "granitemoe"): "refact",
    ("smollm", "starcoder2"): "starcoder",
    ("qwen2", "stablelm"): "stablelm2",
}

# llama.cpp only approximates these: it distinguishes case in ASCII alone and ignores combining marks.
APPROXIMATE = frozenset({"tekken", "gpt-4o"})

_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    (r"\p{N}{1}", r"\p{N}"),
)
_POSSESSIVE = re.compile(r"(?<!\\)([?*+])\+")


def recognise(pre_tokenizer: object, *, ignores_merges: bool, family: str, source: str) -> tuple[str, str | None]:
    """llama.cpp's name of the pre-tokenizer, and a warning where llama.cpp only approximates it.

    `family` is the model type of config.json. Raises TokenizerInvalid with the pattern that llama.cpp does not know.
    """
    steps = tuple(_steps(pre_tokenizer, source))
    variants = _KNOWN.get(steps)
    if variants is None:
        raise TokenizerInvalid(
            f"{source} splits text by {' then '.join(map(repr, steps)) or 'nothing'}, which is none of llama.cpp's "
            "pre-tokenizers that Deskside knows; make the GGUF elsewhere and convert it with --gguf"
        )
    name = variants.get(ignores_merges, next(iter(variants.values())))
    warning = None
    if name in APPROXIMATE:
        warning = f"llama.cpp only approximates the pre-tokenizer {name!r}: it may split accented words elsewhere"
    elif ignores_merges not in variants:
        does = "merges them" if ignores_merges else "looks them up"
        warning = f"{source} treats words that are tokens differently from llama.cpp's {name!r}, which {does}"
    return _FAMILY_NAMES.get((name, family), name), warning


def _steps(step: object, source: str) -> Iterator[str]:
    """The patterns in order, normalised. Raises TokenizerInvalid for a step that is not a pattern."""
    kind = step.get("type") if isinstance(step, dict) else None
    if not isinstance(step, dict) or not isinstance(kind, str):
        raise TokenizerInvalid(
            f"{source} has no pre-tokenizer, but its merges are of bytes; llama.cpp splits text first"
        )
    if kind == "Sequence":
        for inner in entries(step, "pretokenizers"):
            yield from _steps(inner, source)
    elif kind == "Split":
        yield _split(step, source)
    elif kind == "ByteLevel":
        yield from _byte_level(step, source)
    elif kind == "Digits" and step.get("individual_digits"):
        yield _DIGITS
    else:
        raise TokenizerInvalid(
            f"{source} splits text with the pre-tokenizer {kind!r}, which llama.cpp cannot reproduce; "
            "make the GGUF elsewhere and convert it with --gguf"
        )


def _split(step: dict[str, Any], source: str) -> str:
    pattern = part(step, "pattern")
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    # removing what is not matched leaves the matches
    removed = step.get("behavior") == "Removed" and bool(step.get("invert"))
    text = pattern.get("Regex")
    if not isinstance(text, str) or not (isolated or removed):
        raise TokenizerInvalid(f"{source} splits text by {step!r}, which llama.cpp cannot reproduce")
    return spelled(text)


def _byte_level(step: dict[str, Any], source: str) -> Iterator[str]:
    if step.get("add_prefix_space"):
        raise TokenizerInvalid(f"{source} puts a space before every text (add_prefix_space), which llama.cpp lacks")
    if step.get("use_regex", True):
        yield _GPT2


def spelled(pattern: str) -> str:
    """`pattern` with equivalent escapes, contractions and quantifiers written in one way."""
    for old, new in _SPELLINGS:
        pattern = pattern.replace(old, new)
    return _POSSESSIVE.sub(r"\1", pattern)
