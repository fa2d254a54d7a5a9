"""A Hugging Face folder's tokenizer as the fields of a GGUF.

`tokenizer.json` is what transformers reads, so it goes before `tokenizer.model` where both are there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import TokenizerInvalid
from models.common.machine import gc_paused
from models.gguf.fields import Field

from .chat_template import END_OF_TURN_MARKS, TEMPLATE_FIELD, ChatFormat, folder_format
from .pieces import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    AddedToken,
    ParsedTokenizer,
    TokenizerKind,
    TokenTable,
    read_object,
    token_table,
)
from .spacing import NAME_THAT_STRIPS
from .special import TokenizerFiles, special_fields
from .tokenizer_json import read_json
from .tokenizer_model import read_protobuf

# llama.cpp lets special tokens swallow the white space after them, except these three, for models of such a name only.
_KEEP_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_LOST_FILES = ("vocab.json", "tekken.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True)
class VocabularyFields:
    """What a GGUF says of its tokens: `fields` are all of tokenizer.*, `size` counts tokens, padding included.

    `name_part` must stand in `general.name` if it is not empty: llama.cpp tells a family's habits by it.
    """

    fields: Mapping[str, Field]
    size: int
    warnings: tuple[str, ...]
    name_part: str = ""


@gc_paused()
def read_vocabulary(folder: Path, config: Mapping[str, Any], n_rows: int) -> VocabularyFields:
    """The vocabulary of the checkpoint in `folder`: `config` is its config.json, `n_rows` the rows of its embedding.

    Raises TokenizerInvalid naming the file and what is wrong with it, or what llama.cpp cannot repeat; TemplateInvalid.
    """
    chat = folder_format(folder)
    tokenizer = read_object(folder / TOKENIZER_JSON)
    if tokenizer:
        file, family = folder / TOKENIZER_JSON, str(config.get("model_type", ""))
        pieces = read_json(tokenizer, repr(str(file)), family, answers_chats=chat is not None)
    elif (file := folder / TOKENIZER_MODEL).is_file():
        pieces = read_protobuf(file)
    else:
        raise _missing(folder)
    tokens = token_table(pieces, n_rows, repr(str(file)))
    raw = TokenizerFiles(
        tokenizer,
        read_object(folder / TOKENIZER_CONFIG),
        read_object(folder / "generation_config.json"),
        config,
    )
    special = special_fields(raw, tokens, _mark(chat, tokens), sentence=pieces.model != TokenizerKind.BPE)
    strips = _name_that_strips(pieces.added, tokens)
    fields = {**_token_fields(pieces, tokens), **special.fields, **_chat_fields(chat)}
    told = chat.warnings if chat is not None else ("the folder has no chat template",)
    odd = () if strips else _odd_flags(pieces.added)
    return VocabularyFields(fields, n_rows, (*pieces.warnings, *_nfc(pieces), *odd, *special.warnings, *told), strips)


def _missing(folder: Path) -> TokenizerInvalid:
    found = [name for name in _LOST_FILES if (folder / name).is_file()]
    beside = f"; {', '.join(found)} alone is not enough" if found else ""
    return TokenizerInvalid(
        f"{str(folder)!r} has neither {TOKENIZER_JSON!r} nor {TOKENIZER_MODEL!r}{beside}: save the tokenizer with "
        "the model (tokenizer.save_pretrained), or copy it from the base model"
    )


def _token_fields(pieces: ParsedTokenizer, tokens: TokenTable) -> dict[str, Field]:
    fields = {
        "tokenizer.ggml.model": Field.string(pieces.model),
        "tokenizer.ggml.pre": Field.string(pieces.pre),
        "tokenizer.ggml.tokens": Field.string_array([text.encode() for text in tokens.texts]),
        "tokenizer.ggml.token_type": Field.int32_array(tokens.kinds.tolist()),
    }
    if pieces.merges is None:
        fields["tokenizer.ggml.scores"] = Field.float32_array(tokens.scores.tolist())
    else:
        fields["tokenizer.ggml.merges"] = Field.string_array(pieces.merges)
    if pieces.add_space_prefix is not None:
        fields["tokenizer.ggml.add_space_prefix"] = Field.boolean(pieces.add_space_prefix)
    if pieces.remove_extra_whitespaces is not None:
        fields["tokenizer.ggml.remove_extra_whitespaces"] = Field.boolean(pieces.remove_extra_whitespaces)
    if pieces.charsmap:
        fields["tokenizer.ggml.precompiled_charsmap"] = Field.uint8_array(pieces.charsmap)
    return fields


def _chat_fields(chat: ChatFormat | None) -> dict[str, Field]:
    return {} if chat is None or chat.template is None else {TEMPLATE_FIELD: Field.string(chat.template)}


def _mark(chat: ChatFormat | None, tokens: TokenTable) -> str | None:
    template = (chat.template or "") if chat is not None else ""
    return next((mark for mark in END_OF_TURN_MARKS if mark in template and mark in tokens.ids), None)


def _nfc(pieces: ParsedTokenizer) -> tuple[str, ...]:
    note = "the tokenizer composes Unicode (NFC) first and llama.cpp does not: send text that is composed"
    return (note,) if pieces.nfc else ()


def _name_that_strips(added: Sequence[AddedToken], tokens: TokenTable) -> str:
    special = [token for token in added if token.special]
    stripping = {token.text for token in special if token.strips_right}
    known = _KEEP_SPACE | {"</s>"} <= tokens.ids.keys()
    alike = known and stripping >= {token.text for token in special} - _KEEP_SPACE and not stripping & _KEEP_SPACE
    return NAME_THAT_STRIPS if alike and stripping else ""


def _odd_flags(added: Sequence[AddedToken]) -> tuple[str, ...]:
    odd = [token.text for token in added if token.strips_left or token.strips_right or token.single_word]
    if not odd:
        return ()
    return (f"{len(odd)} tokens swallow white space beside them, which llama.cpp does not: {', '.join(odd[:4])} …",)
