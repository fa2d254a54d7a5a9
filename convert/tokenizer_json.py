"""tokenizer.json, the `tokenizers` library's own file, in llama.cpp's terms.

Three kinds of tokenizer are known: byte-level BPE, BPE over characters with a byte for what has no token (as
SentencePiece makes it), and Unigram. What llama.cpp would do otherwise than the file says is refused by name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .errors import TokenizerInvalid
from .tokenizer_files import MAX_MERGES, MAX_TOKENS, entries, is_id, part
from .tokenizer_pattern import recognise
from .tokenizer_pieces import AddedToken, Kind, Piece, Pieces, added_piece
from .tokenizer_spacing import byte_level_spacing, sentence_spacing

_BYTE_TEXTS = {f"<0x{byte:02X}>": byte for byte in range(256)}
_ADDED_SCORE = -1000.0


def read_json(raw: Mapping[str, Any], source: str, family: str, *, answers_chats: bool) -> Pieces:
    """The tokenizer that `source` holds. Raises TokenizerInvalid naming what is wrong, or what llama.cpp cannot do.

    `family` is the model type of config.json; `answers_chats` that there is a chat template.
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
    raw: Mapping[str, Any], model: Mapping[str, Any], added: tuple[AddedToken, ...], source: str, family: str
) -> Pieces:
    _check_bpe(model, source)
    name, warning = recognise(
        raw.get("pre_tokenizer"), ignores_merges=bool(model.get("ignore_merges")), family=family, source=source
    )
    by_id = {index: Piece(text) for text, index in _vocabulary(model, source).items()}
    by_id |= _added_pieces(by_id, added, None, 0.0, source)
    # a space inside would end the first half of the pair
    merges = [" ".join(half.replace(" ", "Ġ") for half in pair) for pair in _merges(model, source)]
    if not merges:
        raise TokenizerInvalid(f"{source} has no merges, without which llama.cpp loads no BPE vocabulary")
    nfc = byte_level_spacing(raw, source)
    warnings = () if warning is None else (warning,)
    return Pieces("gpt2", name, by_id, merges=merges, added=added, nfc=nfc, warnings=warnings)


def _sentence_bpe(
    raw: Mapping[str, Any], model: Mapping[str, Any], added: tuple[AddedToken, ...], source: str, *, answers_chats: bool
) -> Pieces:
    _check_bpe(model, source)
    vocabulary = _vocabulary(model, source)
    if missing := [text for text in _BYTE_TEXTS if text not in vocabulary]:
        raise TokenizerInvalid(f"{source} falls back to bytes, but has no token {missing[0]!r}")
    merges = _merges(model, source)
    scores = _scores(merges)
    by_id = {index: _sentence_piece(text, scores) for text, index in vocabulary.items()}
    by_id |= _added_pieces(by_id, added, model.get("unk_token"), _ADDED_SCORE, source)
    spacing = sentence_spacing(raw, source, splits=False, answers_chats=answers_chats)
    return Pieces(
        "llama",
        "default",
        by_id,
        add_space_prefix=spacing.prefix,
        added=added,
        warnings=(*spacing.warnings, *_joined_otherwise(vocabulary, merges, source)),
    )


def _unigram(
    raw: Mapping[str, Any], model: Mapping[str, Any], added: tuple[AddedToken, ...], source: str, *, answers_chats: bool
) -> Pieces:
    if model.get("byte_fallback"):
        raise TokenizerInvalid(f"{source} is a Unigram tokenizer that falls back to bytes, which llama.cpp cannot")
    listed = entries(model, "vocab")
    if len(listed) > MAX_TOKENS:
        raise TokenizerInvalid(f"{source} has {len(listed)} tokens, the limit is {MAX_TOKENS}")
    by_id = {}
    for index, entry in enumerate(listed):
        if not isinstance(entry, list) or [type(one) for one in entry] not in ([str, float], [str, int]):
            raise TokenizerInvalid(f"{source}: token {index} is {entry!r:.80}, a text and a score are needed")
        by_id[index] = Piece(entry[0], score=float(entry[1]))
    unknown = model.get("unk_id")
    if not is_id(unknown) or unknown not in by_id:
        raise TokenizerInvalid(f"{source} names no token for the unknown (unk_id is {unknown!r})")
    unknown_text = by_id[unknown].text
    by_id[unknown] = Piece(unknown_text, Kind.UNKNOWN, by_id[unknown].score)
    by_id |= _added_pieces(by_id, added, unknown_text, _ADDED_SCORE, source)
    spacing = sentence_spacing(raw, source, splits=True, answers_chats=answers_chats)
    return Pieces(
        "t5",
        "default",
        by_id,
        add_space_prefix=spacing.prefix,
        remove_extra_whitespaces=spacing.removes_extra,
        charsmap=spacing.charsmap,
        added=added,
        warnings=spacing.warnings,
    )


def _check_bpe(model: Mapping[str, Any], source: str) -> None:
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise TokenizerInvalid(f"{source} has the BPE option {option} = {model[option]!r}, which llama.cpp cannot")


def _vocabulary(model: Mapping[str, Any], source: str) -> dict[str, int]:
    vocabulary = part(model, "vocab")
    if not 0 < len(vocabulary) <= MAX_TOKENS:
        raise TokenizerInvalid(f"{source} has {len(vocabulary)} tokens; between 1 and {MAX_TOKENS} are allowed")
    owners: dict[int, str] = {}
    for text, index in vocabulary.items():
        if not is_id(index) or index > MAX_TOKENS:
            raise TokenizerInvalid(f"{source} gives token {text[:64]!r} the id {index!r}, limit {MAX_TOKENS}")
        if index in owners:
            raise TokenizerInvalid(f"{source} gives the id {index} to {owners[index][:64]!r} and to {text[:64]!r}")
        owners[index] = text
    return vocabulary


def _merges(model: Mapping[str, Any], source: str) -> list[tuple[str, str]]:
    """The pairs in order, from either spelling: "a b" or ["a", "b"]."""
    listed = entries(model, "merges")
    if len(listed) > MAX_MERGES:
        raise TokenizerInvalid(f"{source} has {len(listed)} merges, the limit is {MAX_MERGES}")
    pairs = []
    for index, merge in enumerate(listed):
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if type(halves) is list and len(halves) == 2:
            left, right = halves
            # half a million of them: the exact type, which JSON gives, is the cheapest question
            if type(left) is str and type(right) is str and left and right:
                pairs.append((left, right))
                continue
        raise TokenizerInvalid(f"{source}: merge {index} is {merge!r:.80}, two pieces are needed")
    return pairs


def _scores(merges: list[tuple[str, str]]) -> dict[str, float]:
    """What each merged token scores, so that llama.cpp, which merges the best score first, keeps the merges' order."""
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores)))
    return scores


def _sentence_piece(text: str, scores: Mapping[str, float]) -> Piece:
    kind = Kind.BYTE if text in _BYTE_TEXTS else Kind.NORMAL
    return Piece(text, kind, 0.0 if kind is Kind.BYTE else scores.get(text, -float(len(scores))))


def _joined_otherwise(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], source: str) -> Iterator[str]:
    """llama.cpp joins any two pieces that make a token, Hugging Face only those in the merges: is that the same?"""
    pairs = set(merges)
    texts = [text for text in vocabulary if text not in _BYTE_TEXTS]
    extra = [
        text
        for text in texts
        for at in range(1, len(text))
        if (left := text[:at]) in vocabulary and (right := text[at:]) in vocabulary and (left, right) not in pairs
    ]
    if extra:
        yield (
            f"{source} has {len(extra)} pairs of pieces that no merge joins but llama.cpp does ({extra[0]!r:.40}): "
            "texts may come out differently"
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
    by_id: Mapping[int, Piece], added: tuple[AddedToken, ...], unknown: object, score: float, source: str
) -> dict[int, Piece]:
    for token in added:
        if token.id in by_id and by_id[token.id].text != token.text:
            texts = f"{by_id[token.id].text[:64]!r} and to the added {token.text[:64]!r}"
            raise TokenizerInvalid(f"{source} gives the id {token.id} to {texts}")
    pieces = {token.id: added_piece(token, score, unknown=token.text == unknown) for token in added}
    known = {piece.text: index for index, piece in by_id.items()}
    if isinstance(unknown, str) and unknown in known:
        pieces[known[unknown]] = Piece(unknown, Kind.UNKNOWN, score)
    return pieces
