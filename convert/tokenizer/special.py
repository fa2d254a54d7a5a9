"""Special tokens: BOS, EOS, padding, unknown, and whether llama.cpp adds BOS and EOS to a text itself.

A model that misses its end token babbles on. Hugging Face may name several ids that end an answer; llama.cpp has three
fields for them (eos, eot, eom) and recognises more by their text, so each id must get a field or have a known text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.errors import TokenizerInvalid
from models.gguf.fields import Field

from .pieces import TokenTable, TokenType, entries, is_id, part

# Texts that llama.cpp always takes for an end token, without a field that names them (src/llama-vocab.cpp).
ENDS_BY_TEXT = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    }
)
_ADDS_BOS_UNASKED = ("Llama", "CodeLlama", "Gemma")
_ROLES = ("bos", "unk", "pad", "sep", "mask")
_FIELD_NAMES = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # as GGUF spells it


@dataclass(frozen=True)
class TokenizerFiles:
    """The small JSON files of a checkpoint that describe its tokens."""

    tokenizer: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class SpecialFields:
    """The fields of special tokens, and warnings for the user."""

    fields: Mapping[str, Field]
    warnings: tuple[str, ...]


def special_fields(
    folder: TokenizerFiles, tokens: TokenTable, end_of_turn: str | None, *, sentence: bool
) -> SpecialFields:
    """The fields tokenizer.ggml.*_token_id and add_*_token. `end_of_turn` is the mark that the chat template writes.

    `sentence`: it is a SentencePiece tokenizer. Raises TokenizerInvalid when no token ends an answer or an id is out
    of range.
    """
    ids, texts = tokens.ids, tokens.texts
    roles = {role: found for role in _ROLES if (found := _role(role, folder, ids, len(texts))) is not None}
    ends, warnings = _ends(folder, ids, len(texts))
    if sentence and "unk" not in roles:
        roles |= [("unk", int(index)) for index in np.flatnonzero(tokens.kinds == TokenType.UNKNOWN)[:1]]
    places, unplaced = _places(ends, texts, ids.get(end_of_turn or ""))
    if unplaced:
        shown = ", ".join(repr(texts[index]) for index in unplaced)
        warnings.append(f"llama.cpp has no field left for the end tokens {shown}: an answer will not stop at them")
    adds, contradicted = _adds(folder, ids, roles.get("bos"), ends[0], sentence=sentence)
    warnings += contradicted
    # without a field llama.cpp takes token 11 of a BPE vocabulary, an ordinary token
    roles.setdefault("bos", ends[0])
    fields = {f"tokenizer.ggml.{_FIELD_NAMES.get(role, role)}_token_id": index for role, index in roles.items()}
    fields |= {f"tokenizer.ggml.{place}_token_id": index for place, index in places.items()}
    flags = {f"tokenizer.ggml.add_{role}_token": Field.boolean(value) for role, value in adds.items()}
    return SpecialFields({key: Field.uint32(index) for key, index in sorted(fields.items())} | flags, tuple(warnings))


def token_text(entry: object) -> str:
    """The text of a token that is written as a string or as an object; empty if there is none."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


def _role(role: str, folder: TokenizerFiles, ids: Mapping[str, int], size: int) -> int | None:
    """The token's id from tokenizer_config.json, else from config.json: transformers' order."""
    text = token_text(folder.tokenizer_config.get(f"{role}_token"))
    if text in ids:
        return ids[text]
    index = _configured(folder.config, f"{role}_token_id")
    return index if is_id(index) and index < size else None


def _configured(config: Mapping[str, Any], key: str) -> Any:
    return config[key] if config.get(key) is not None else part(config, "text_config").get(key)


def _ends(folder: TokenizerFiles, ids: Mapping[str, int], size: int) -> tuple[list[int], list[str]]:
    """Every id that ends an answer, the one of tokenizer_config.json first; and warnings.

    An id beyond the vocabulary is left out, as a model cannot write it. Raises TokenizerInvalid if no id is left.
    """
    found = [ids[text]] if (text := token_text(folder.tokenizer_config.get("eos_token"))) in ids else []
    beyond: list[int] = []
    for config in (folder.generation_config, folder.config):
        named = _configured(config, "eos_token_id")
        for index in named if isinstance(named, list) else [named]:
            if index is None:
                continue
            if not is_id(index):
                raise TokenizerInvalid(f"eos_token_id names {index!r}, the vocabulary has {size} tokens")
            (found if index < size else beyond).append(index)
    if not found:
        told = f"eos_token_id names {beyond[0]}, the vocabulary has {size} tokens; " if beyond else ""
        raise TokenizerInvalid(f"{told}no token ends an answer: name one as eos_token in tokenizer_config.json")
    warnings = [f"eos_token_id names {index}, which is left out: the vocabulary has {size} tokens" for index in beyond]
    return list(dict.fromkeys(found)), list(dict.fromkeys(warnings))


def _places(ends: Sequence[int], texts: Sequence[str], turn: int | None) -> tuple[dict[str, int], list[int]]:
    """Ids for eos, eot and eom, and the end tokens that get no field and that llama.cpp does not know by their text."""
    places = {"eos": ends[0]}
    rest = [index for index in ends[1:] if texts[index] not in ENDS_BY_TEXT]
    if turn is not None and turn != ends[0] and (texts[turn] in ENDS_BY_TEXT or turn in rest or not rest):
        places["eot"] = turn
        rest = [index for index in rest if index != turn]
    for place in ("eot", "eom"):
        if rest and place not in places:
            places[place] = rest.pop(0)
    return places, rest


def _adds(
    folder: TokenizerFiles, ids: Mapping[str, int], bos: int | None, eos: int, *, sentence: bool
) -> tuple[dict[str, bool], list[str]]:
    """The flags add_bos and add_eos, and warnings: tokenizer.json's post-processor takes precedence over the config."""
    shown, warnings = _post_processed(folder.tokenizer, ids, bos, eos)
    adds = {}
    for role, index in (("bos", bos), ("eos", eos)):
        said = folder.tokenizer_config.get(f"add_{role}_token")
        said = said if isinstance(said, bool) else None
        if role in shown and said is not None and said != shown[role]:
            warnings.append(
                f"tokenizer_config.json says add_{role}_token = {said}, tokenizer.json the opposite, which is used"
            )
        kind = str(folder.tokenizer_config.get("tokenizer_class", ""))
        unasked = role == "bos" and sentence and kind.startswith(_ADDS_BOS_UNASKED)
        added = shown.get(role, unasked if said is None else said)
        adds[role] = added and index is not None
    return adds, warnings


def _post_processed(
    tokenizer: Mapping[str, Any], ids: Mapping[str, int], bos: int | None, eos: int
) -> tuple[dict[str, bool], list[str]]:
    """The flags that tokenizer.json's post-processor implies, and warnings; empty if it has none."""
    processor = tokenizer.get("post_processor")
    if not tokenizer or not isinstance(processor, dict):
        return {}, []
    shown: dict[str, bool] = {}
    warnings: list[str] = []
    for step in entries(processor, "processors") or [processor]:
        if not isinstance(step, dict) or step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing":
            warnings.append(f"tokenizer.json's post-processor {step.get('type')!r} is left out: llama.cpp has none")
            continue
        before, after = _around(step)
        shown = {"bos": bool(before), "eos": bool(after)}
        wrong = [text for text in before if ids.get(text) != bos] + [text for text in after if ids.get(text) != eos]
        if wrong or len(before) > 1 or len(after) > 1:
            warnings.append(f"tokenizer.json puts {before + after} around a text; llama.cpp adds only BOS and EOS")
            shown = {"bos": bos in map(ids.get, before), "eos": eos in map(ids.get, after)}
    return shown or {"bos": False, "eos": False}, warnings


def _around(step: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The special tokens before and after the text in a template for a single sequence."""
    before: list[str] = []
    after: list[str] = []
    side = before
    for entry in entries(step, "single"):
        if part(entry, "Sequence"):
            side = after
        side += _named(entry)
    return before, after


def _named(entry: object) -> Iterator[str]:
    text = part(entry, "SpecialToken").get("id")
    if isinstance(text, str):
        yield text
