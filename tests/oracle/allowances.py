"""The metadata keys in which our files may differ from llama.cpp's converter's: each with its reason and a check."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.gguf.fields import Field

_UNKNOWN, _NORMAL = 2, 1
Fields = Mapping[str, Field]


@dataclass(frozen=True)
class Allowance:
    """The reason for which a key may differ, and a check that it differs in that way only."""

    reason: str
    holds: Callable[[Fields, Fields], bool]


def allowed(key: str, ours: Fields, theirs: Fields) -> bool:
    """True if the difference of `key` is a listed one."""
    allowance = ALLOWANCES.get(key)
    return allowance is not None and allowance.holds(ours, theirs)


def _is_bpe(fields: Fields) -> bool:
    return fields["tokenizer.ggml.model"].value == "gpt2"


def _only_ours(key: str, value: object, *, bpe: bool | None = None) -> Callable[[Fields, Fields], bool]:
    """The key is missing in theirs, and ours has llama.cpp's default."""

    def holds(ours: Fields, theirs: Fields) -> bool:
        at_home = bpe is None or _is_bpe(ours) is bpe
        return at_home and key not in theirs and key in ours and ours[key].value == value

    return holds


def _space_prefix(ours: Fields, theirs: Fields) -> bool:
    key = "tokenizer.ggml.add_space_prefix"
    meaningless = _is_bpe(ours) and key not in ours and theirs[key].value is False
    return meaningless or _only_ours(key, True, bpe=False)(ours, theirs)


def _names_an_end(ours: Fields, theirs: Fields) -> bool:
    key = "tokenizer.ggml.bos_token_id"
    ends = ours["tokenizer.ggml.eos_token_id"].value
    return _is_bpe(ours) and key not in theirs and ours[key].value == ends


def _in_template(ours: Fields, theirs: Fields) -> bool:
    key, tokens = "tokenizer.ggml.eot_token_id", ours["tokenizer.ggml.tokens"].strings or []
    index, template = ours[key].value, ours["tokenizer.chat_template"].value
    return key not in theirs and isinstance(index, int) and tokens[index].decode() in str(template)


def _same_order(ours: Fields, theirs: Fields) -> bool:
    """True if both scores merge the same pieces first; scores of pieces that are not merged do not matter."""
    key = "tokenizer.ggml.scores"
    mine, other = ours[key].numbers or (), theirs[key].numbers or ()
    if set(other) == {-1000.0}:
        return True
    tokens = [token.decode() for token in ours["tokenizer.ggml.tokens"].strings or []]
    kinds = ours["tokenizer.ggml.token_type"].numbers or ()
    merged = [index for index, token in enumerate(tokens) if len(token) > 1 and kinds[index] == _NORMAL]
    return sorted(merged, key=lambda index: -mine[index]) == sorted(merged, key=lambda index: -other[index])


def _only_unknown(ours: Fields, theirs: Fields) -> bool:
    key, unknown = "tokenizer.ggml.token_type", ours["tokenizer.ggml.unknown_token_id"].value
    mine, other = ours[key].numbers or (), theirs[key].numbers or ()
    differing = [index for index, (one, two) in enumerate(zip(mine, other, strict=True)) if one != two]
    return differing == [unknown] and mine[differing[0]] == _UNKNOWN


ALLOWANCES: Mapping[str, Allowance] = {
    "tokenizer.ggml.add_sep_token": Allowance(
        "it tells how a pair of texts is joined; a model that writes is never given one",
        lambda ours, theirs: "tokenizer.ggml.add_sep_token" not in ours,
    ),
    "tokenizer.ggml.add_space_prefix": Allowance(
        "we write out what llama.cpp takes for granted in a SentencePiece vocabulary; a byte-level one ignores it",
        _space_prefix,
    ),
    "tokenizer.ggml.add_bos_token": Allowance(
        "we write out what llama.cpp takes for granted in a byte-level vocabulary",
        _only_ours("tokenizer.ggml.add_bos_token", False, bpe=True),
    ),
    "tokenizer.ggml.add_eos_token": Allowance(
        "we write out what llama.cpp takes for granted", _only_ours("tokenizer.ggml.add_eos_token", False)
    ),
    "tokenizer.ggml.unknown_token_id": Allowance(
        "we write out what llama.cpp takes for granted in a SentencePiece vocabulary",
        _only_ours("tokenizer.ggml.unknown_token_id", 0, bpe=False),
    ),
    "tokenizer.ggml.bos_token_id": Allowance(
        "a byte-level vocabulary without BOS: where none is named, llama.cpp takes token 11 for it", _names_an_end
    ),
    "tokenizer.ggml.eot_token_id": Allowance(
        "the token that ends a turn in the chat template: without it a fine-tune does not stop", _in_template
    ),
    "tokenizer.ggml.scores": Allowance(
        "ours count the merges of tokenizer.json, theirs are tokenizer.model's, or all -1000 where that is missing: "
        "what counts is which of two merges comes first",
        _same_order,
    ),
    "tokenizer.ggml.token_type": Allowance(
        "the unknown token stays UNKNOWN, as tokenizer.model has it; they make it CONTROL, as all special tokens",
        _only_unknown,
    ),
}
