"""Read tokenizer.json, the file of the `tokenizers` library, in llama.cpp's terms.

Three kinds of tokenizer are known: byte-level BPE, BPE over characters with byte fallback (SentencePiece's), and
Unigram. Options that llama.cpp cannot reproduce are refused by name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.errors import TokenizerInvalid

from .pieces import (
    MAX_MERGES,
    MAX_TOKENS,
    AddedToken,
    ParsedTokenizer,
    Piece,
    TokenizerKind,
    TokenType,
    added_piece,
    entries,
    is_id,
    part,
)
from .pre_tokenizer import recognise
from .spacing import byte_level_spacing, sentence_spacing

_BYTE_TEXTS = {f"<0x{byte:02X}>": byte for byte in range(256)}
_ADDED_SCORE = -1000.0
_MAX_SCORE = float(np.finfo(np.float32).max)


def read_json(raw: Mapping[str, Any], source: str, family: str, *, answers_chats: bool) -> ParsedTokenizer:
    """Read the tokenizer in `raw`, the parsed tokenizer.json named `source` in messages.

    `family` is the model type of config.json; `answers_chats`: the model has a chat template. Consumes the merges of
    `raw`, which are most of its memory. Raises TokenizerInvalid naming the fault, or what llama.cpp cannot reproduce.
    """
    model = part(raw, "model")
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    added = tuple(_added_tokens(raw, source))
    if kind == "BPE" and model.get("byte_fallback"):
        return _sentence_bpe(raw, model, added, source, answers_chats=answers_chats)
    if kind == "BPE":
        return _byte_bpe(raw, model, added, source, family)
    if kind == "Unigram":
        return _unigram(raw, model, added, source, answers_chats=answers_chats)
    raise TokenizerInvalid(f"{source} is a {kind!r} tokenizer; known are BPE and Unigram")


def _byte_bpe(
    raw: Mapping[str, Any], model: dict[str, Any], added: Sequence[AddedToken], source: str, family: str
) -> ParsedTokenizer:
    _check_bpe(model, source)
    name, warning = recognise(
        raw.get("pre_tokenizer"), ignores_merges=bool(model.get("ignore_merges")), family=family, source=source
    )
    texts = _by_id(part(model, "vocab"), source)
    odd = _added_pieces(texts, added, source)
    # a space inside would end the first half of the pair
    pairs = ((left.replace(" ", "Ġ"), right.replace(" ", "Ġ")) for left, right in _merges(model, source))
    merges = [f"{left} {right}".encode() for left, right in pairs]
    if not merges:
        raise TokenizerInvalid(f"{source} has no merges, without which llama.cpp loads no BPE vocabulary")
    nfc = byte_level_spacing(raw, source)
    warnings = () if warning is None else (warning,)
    return ParsedTokenizer(TokenizerKind.BPE, name, texts, odd, merges=merges, added=added, nfc=nfc, warnings=warnings)


def _sentence_bpe(
    raw: Mapping[str, Any], model: dict[str, Any], added: Sequence[AddedToken], source: str, *, answers_chats: bool
) -> ParsedTokenizer:
    _check_bpe(model, source)
    vocabulary = part(model, "vocab")
    texts = _by_id(vocabulary, source)
    if missing := [text for text in _BYTE_TEXTS if text not in vocabulary]:
        raise TokenizerInvalid(f"{source} falls back to bytes, but has no token {missing[0]!r}")
    cuts = _cuts(_merges(model, source), vocabulary)
    unknown = model.get("unk_token")
    odd = {vocabulary[text]: Piece(text, TokenType.BYTE) for text in _BYTE_TEXTS}
    odd |= _added_pieces(texts, added, source, unknown)
    if isinstance(unknown, str) and unknown in vocabulary:
        odd[vocabulary[unknown]] = Piece(unknown, TokenType.UNKNOWN, _ADDED_SCORE)
    spacing = sentence_spacing(raw, source, splits=False, answers_chats=answers_chats)
    return ParsedTokenizer(
        TokenizerKind.SENTENCEPIECE,
        "default",
        texts,
        odd,
        _scores(cuts, max(texts) + 1),
        add_space_prefix=spacing.prefix,
        spaces_first=spacing.first,
        added=added,
        warnings=(*spacing.warnings, *_extra_joins(vocabulary, cuts, source)),
    )


def _unigram(
    raw: Mapping[str, Any], model: Mapping[str, Any], added: Sequence[AddedToken], source: str, *, answers_chats: bool
) -> ParsedTokenizer:
    if model.get("byte_fallback"):
        raise TokenizerInvalid(f"{source} is a Unigram tokenizer with byte fallback, which llama.cpp lacks")
    listed = entries(model, "vocab")
    if len(listed) > MAX_TOKENS:
        raise TokenizerInvalid(f"{source} has {len(listed)} tokens, the limit is {MAX_TOKENS}")
    texts: dict[int, str] = {}
    scores = np.zeros(len(listed), np.float32)
    for index, entry in enumerate(listed):
        right = isinstance(entry, list) and [type(one) for one in entry] in ([str, float], [str, int])
        if not right or not abs(entry[1]) <= _MAX_SCORE:
            raise TokenizerInvalid(f"{source}: token {index} is {entry!r:.80}, a text and a score are needed")
        texts[index], scores[index] = entry
    unknown = model.get("unk_id")
    if not is_id(unknown) or unknown not in texts:
        raise TokenizerInvalid(f"{source} names no token for the unknown (unk_id is {unknown!r})")
    odd = _added_pieces(texts, added, source, texts[unknown])
    odd[unknown] = Piece(texts[unknown], TokenType.UNKNOWN, _ADDED_SCORE)
    spacing = sentence_spacing(raw, source, splits=True, answers_chats=answers_chats)
    return ParsedTokenizer(
        TokenizerKind.UNIGRAM,
        "default",
        texts,
        odd,
        scores,
        add_space_prefix=spacing.prefix,
        spaces_first=spacing.first,
        remove_extra_whitespaces=spacing.removes_extra,
        charsmap=spacing.charsmap,
        added=added,
        warnings=spacing.warnings,
    )


def _check_bpe(model: Mapping[str, Any], source: str) -> None:
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise TokenizerInvalid(f"{source} has the BPE option {option} = {model[option]!r}, which llama.cpp lacks")


def _by_id(vocabulary: Mapping[str, Any], source: str) -> dict[int, str]:
    if not 0 < len(vocabulary) <= MAX_TOKENS:
        raise TokenizerInvalid(f"{source} has {len(vocabulary)} tokens; between 1 and {MAX_TOKENS} are allowed")
    texts: dict[int, str] = {}
    for text, index in vocabulary.items():
        if not is_id(index) or index > MAX_TOKENS:
            raise TokenizerInvalid(f"{source} gives token {text[:64]!r} the id {index!r}, limit {MAX_TOKENS}")
        if index in texts:
            raise TokenizerInvalid(f"{source} gives the id {index} to {texts[index][:64]!r} and to {text[:64]!r}")
        texts[index] = text
    return texts


def _merges(model: dict[str, Any], source: str) -> Iterator[tuple[str, str]]:
    """The pairs in order, from either form: "a b" or ["a", "b"]. Releases each merge in `model` once read."""
    listed = entries(model, "merges")
    if len(listed) > MAX_MERGES:
        raise TokenizerInvalid(f"{source} has {len(listed)} merges, the limit is {MAX_MERGES}")
    for index, merge in enumerate(listed):
        listed[index] = None
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if type(halves) is list and len(halves) == 2:
            left, right = halves
            # half a million of them: comparing exact types is the cheapest check
            if type(left) is str and type(right) is str and left and right:
                yield left, right
                continue
        raise TokenizerInvalid(f"{source}: merge {index} is {merge!r:.80}, two pieces are needed")


def _cuts(merges: Iterable[tuple[str, str]], vocabulary: Mapping[str, int]) -> dict[int | str, int]:
    """Results of the merges in order -> their cuts: bit n is set if a merge joins its first n characters to the rest.

    A result that is a token is keyed by its id, which takes no memory of its own, any other by its text.
    """
    cuts: dict[int | str, int] = {}
    for left, right in merges:
        text = left + right
        made = vocabulary.get(text, text)
        cuts[made] = cuts.get(made, 0) | 1 << len(left)
    return cuts


def _scores(cuts: Mapping[int | str, int], n_scores: int) -> np.ndarray:
    """Scores by id that make llama.cpp, which merges the best score first, follow the merges' order."""
    scores = np.full(n_scores, -float(len(cuts)), np.float32)
    for rank, made in enumerate(cuts):
        if isinstance(made, int):
            scores[made] = -float(rank)
    return scores


def _extra_joins(vocabulary: Mapping[str, int], cuts: Mapping[int | str, int], source: str) -> Iterator[str]:
    """Warn of pairs that llama.cpp joins but no merge does: it joins any two pieces that make a token."""
    extra = []
    for text, index in vocabulary.items():
        cut = cuts.get(index, 0)
        for at in range(1, len(text)):
            # over a million places: the cheapest check first
            if not cut >> at & 1 and text[at:] in vocabulary and text[:at] in vocabulary and text not in _BYTE_TEXTS:
                extra.append(text)
    if extra:
        yield (
            f"{source} has {len(extra)} pairs of pieces that no merge joins but llama.cpp does ({extra[0]!r:.40}): "
            "texts may get other tokens"
        )


def _added_tokens(raw: Mapping[str, Any], source: str) -> Iterator[AddedToken]:
    seen: dict[int, str] = {}
    for entry in entries(raw, "added_tokens"):
        text, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(text, str) or not text or not is_id(index) or index > MAX_TOKENS:
            raise TokenizerInvalid(f"{source} has the added token {entry!r:.120}; a content and an id are needed")
        if index in seen:
            raise TokenizerInvalid(f"{source} gives the id {index} to {seen[index][:64]!r} and to {text[:64]!r}")
        seen[index] = text
        flags = (bool(entry.get(key)) for key in ("special", "normalized", "lstrip", "rstrip", "single_word"))
        yield AddedToken(index, text, *flags)


def _added_pieces(
    texts: Mapping[int, str], added: Sequence[AddedToken], source: str, unknown: object = None
) -> dict[int, Piece]:
    for token in added:
        if texts.get(token.id, token.text) != token.text:
            both = f"{texts[token.id][:64]!r} and to the added {token.text[:64]!r}"
            raise TokenizerInvalid(f"{source} gives the id {token.id} to {both}")
    return {token.id: added_piece(token, _ADDED_SCORE, unknown=token.text == unknown) for token in added}
