"""Convert a Hugging Face folder's tokenizer into the `tokenizer.*` fields of a GGUF.

`tokenizer.json` takes precedence over `tokenizer.model` where a folder has both, as in transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import TokenizerInvalid
from models.common.machine import gc_paused
from models.gguf.fields import Field

from .chat_template import (
    AS_IT_IS,
    END_OF_TURN_MARKS,
    TEMPLATE_FIELD,
    ChatFormat,
    TemplateRules,
    folder_format,
    named_tokens,
)
from .pieces import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    AddedToken,
    ParsedTokenizer,
    TokenizerKind,
    TokenTable,
    read_object,
    read_tokenizer_config,
    token_table,
    with_config_tokens,
)
from .spacing import NAME_THAT_STRIPS
from .special import TokenizerFiles, special_fields
from .tokenizer_json import read_json
from .tokenizer_model import read_protobuf

# In models called NAME_THAT_STRIPS llama.cpp strips white space after special tokens, except after these three.
_KEEP_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
GENERATION_CONFIG = "generation_config.json"
_LOST_FILES = ("vocab.json", "tekken.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class VocabularyFields:
    """All `tokenizer.*` fields of a GGUF. `size` is the number of tokens, padding included.

    `name_part` must occur in `general.name` if it is not empty, and no other such part may: llama.cpp derives from the
    name how special tokens treat white space (see `general_name`). `rules`: how a chat template is written for it.
    """

    fields: Mapping[str, Field]
    size: int
    warnings: tuple[str, ...]
    name_part: str = ""
    rules: TemplateRules = AS_IT_IS


@dataclass(frozen=True)
class BaseFormat:
    """The chat format and the generation_config.json of an adapter's base."""

    chat: ChatFormat | None
    generation: Mapping[str, Any]


def has_tokenizer(folder: Path) -> bool:
    """True if `folder` holds a tokenizer that can be read."""
    return any((folder / name).is_file() for name in (TOKENIZER_JSON, TOKENIZER_MODEL))


@gc_paused()
def read_vocabulary(
    folder: Path, config: Mapping[str, Any], n_rows: int, *, of_base: BaseFormat | None = None
) -> VocabularyFields:
    """Read the vocabulary of the checkpoint in `folder`: `config` is its config.json, `n_rows` its embedding's rows.

    `of_base`: what an adapter's folder takes from its base where it has no own. Raises TokenizerInvalid naming the
    file and the fault, or what llama.cpp cannot reproduce; TemplateInvalid.
    """
    chat = folder_format(folder) or (of_base.chat if of_base is not None else None)
    tokenizer, described = read_object(folder / TOKENIZER_JSON), read_tokenizer_config(folder)
    if tokenizer:
        tokenizer = with_config_tokens(tokenizer, described)
        file, family = folder / TOKENIZER_JSON, str(config.get("model_type", ""))
        parsed = read_json(tokenizer, repr(str(file)), family, answers_chats=chat is not None)
    elif (file := folder / TOKENIZER_MODEL).is_file():
        parsed = read_protobuf(file)
    else:
        raise _missing(folder)
    tokens = token_table(parsed, n_rows, repr(str(file)))
    raw = TokenizerFiles(
        tokenizer,
        described,
        read_object(folder / GENERATION_CONFIG) or dict(of_base.generation if of_base is not None else {}),
        config,
    )
    special = special_fields(raw, tokens, _end_of_turn(chat, tokens), sentence=parsed.model != TokenizerKind.BPE)
    strips = _name_that_strips(parsed.added, tokens)
    rules = _template_rules(described, parsed, tokens, special.fields)
    fields = {**_token_fields(parsed, tokens), **special.fields, **_chat_fields(chat, rules)}
    chat_warnings = chat.warnings if chat is not None else ("the folder has no chat template",)
    ignored = () if strips else _ignored_flags(parsed.added)
    return VocabularyFields(
        fields, n_rows, (*parsed.warnings, *_nfc(parsed), *ignored, *special.warnings, *chat_warnings), strips, rules
    )


def _template_rules(
    described: Mapping[str, Any], parsed: ParsedTokenizer, tokens: TokenTable, special: Mapping[str, Field]
) -> TemplateRules:
    named = {name: text for name, text in named_tokens(described).items() if text in tokens.ids}
    ids = {name: special.get(f"tokenizer.ggml.{name}_id") for name in ("bos_token", "eos_token")}
    served = {name: tokens.texts[field.value] for name, field in ids.items() if field and isinstance(field.value, int)}
    after = frozenset(token.text for token in parsed.added) if parsed.spaces_first else None
    return TemplateRules(named, served, after)


def _missing(folder: Path) -> TokenizerInvalid:
    found = [name for name in _LOST_FILES if (folder / name).is_file()]
    beside = f"; {', '.join(found)} alone is not enough" if found else ""
    return TokenizerInvalid(
        f"{str(folder)!r} has neither {TOKENIZER_JSON!r} nor {TOKENIZER_MODEL!r}{beside}: save the tokenizer with "
        "the model (tokenizer.save_pretrained), or copy it from the base model"
    )


def _token_fields(parsed: ParsedTokenizer, tokens: TokenTable) -> dict[str, Field]:
    fields = {
        "tokenizer.ggml.model": Field.string(parsed.model),
        "tokenizer.ggml.pre": Field.string(parsed.pre),
        "tokenizer.ggml.tokens": Field.string_array([text.encode() for text in tokens.texts]),
        "tokenizer.ggml.token_type": Field.int32_array(tokens.kinds.tolist()),
    }
    if parsed.merges is None:
        fields["tokenizer.ggml.scores"] = Field.float32_array(tokens.scores.tolist())
    else:
        fields["tokenizer.ggml.merges"] = Field.string_array(parsed.merges)
    if parsed.add_space_prefix is not None:
        fields["tokenizer.ggml.add_space_prefix"] = Field.boolean(parsed.add_space_prefix)
    if parsed.remove_extra_whitespaces is not None:
        fields["tokenizer.ggml.remove_extra_whitespaces"] = Field.boolean(parsed.remove_extra_whitespaces)
    if parsed.charsmap:
        fields["tokenizer.ggml.precompiled_charsmap"] = Field.uint8_array(parsed.charsmap)
    return fields


def _chat_fields(chat: ChatFormat | None, rules: TemplateRules) -> dict[str, Field]:
    return {} if chat is None or chat.template is None else {TEMPLATE_FIELD: Field.string(rules.written(chat.template))}


def _end_of_turn(chat: ChatFormat | None, tokens: TokenTable) -> str | None:
    template = (chat.template or "") if chat is not None else ""
    return next((mark for mark in END_OF_TURN_MARKS if mark in template and mark in tokens.ids), None)


def _nfc(parsed: ParsedTokenizer) -> tuple[str, ...]:
    note = "the tokenizer composes Unicode (NFC) first and llama.cpp does not: send composed text"
    return (note,) if parsed.nfc else ()


def _name_that_strips(added: Sequence[AddedToken], tokens: TokenTable) -> str:
    special = {token.text for token in added if token.special}
    stripping = {token.text for token in added if token.special and token.strips_right}
    all_known = _KEEP_SPACE | {"</s>"} <= tokens.ids.keys()
    is_alike = all_known and stripping >= special - _KEEP_SPACE and not stripping & _KEEP_SPACE
    return NAME_THAT_STRIPS if is_alike and stripping else ""


def _ignored_flags(added: Sequence[AddedToken]) -> tuple[str, ...]:
    odd = [token.text for token in added if token.strips_left or token.strips_right or token.single_word]
    if not odd:
        return ()
    return (f"{len(odd)} tokens strip white space beside them, llama.cpp does not: {', '.join(odd[:4])} …",)
