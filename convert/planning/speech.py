"""The tokenizer and the chat format of the model to be made: the adapter's own if its folder has them, else the base's.

A fine-tune that adds tokens (`<|im_start|>`, labels) or gives reserved ones a text saves its tokenizer beside its
adapter. With the base's tokenizer those tokens would be read as letters, and none of them would end an answer.

Special tokens that answers are made of (labels and marks) become user-defined ones, which are read and shown, as one
token. llama.cpp neither shows a control token nor reads one in a message: an answer that is one would be empty, and a
label would be spelled in letters, which the model never learned.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint.folder import HfCheckpoint
from convert.checkpoint.source import Checkpoint
from convert.errors import AdapterInvalid
from convert.tokenizer.chat_template import END_OF_TURN_FIELD, ChatFormat, choose_format, folder_format
from convert.tokenizer.pieces import SPACE_MARK, TokenType, read_object
from convert.tokenizer.read import GENERATION_CONFIG, BaseFormat, has_tokenizer, read_vocabulary
from convert.tokenizer.spacing import general_name
from convert.tokenizer.special import ENDS_BY_TEXT
from convert.trim.fields import KEPT_FIELD
from models.gguf.fields import TOKENS, Field
from models.gguf.header import Header

_TYPES = "tokenizer.ggml.token_type"
_PREFIX = "tokenizer."
_MARK = SPACE_MARK.encode()
_END_FIELDS = ("tokenizer.ggml.eos_token_id", END_OF_TURN_FIELD, "tokenizer.ggml.eom_token_id")
# Kinds of token that a text is made of; texts of other kinds may be changed by a fine-tune.
_ORDINARY = (TokenType.NORMAL, TokenType.BYTE)
_ROLE = re.compile(r"tokenizer\.ggml\.\w+_token_id")
# Kinds of special token that published vocabularies have at their end, none of them an answer.
_USUAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|.*(image|audio|video|vision|soft_token|fim|pad|mask|unused|reserved|extra_id).*", re.I
)
_SHOWN = 4


@dataclass(frozen=True)
class Folders:
    """The folders that a model's tokenizer and chat template are read from; None where a GGUF has its own."""

    tokenizer: Path | None
    template: Path | None


@dataclass(frozen=True)
class Speech:
    """The header with the vocabulary to be written, the chat format, and warnings for the user.

    `added`: the tokens that the adapter's tokenizer spells and its base does not, by id.
    """

    header: Header
    chat: ChatFormat
    added: Mapping[int, str]
    warnings: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer or a turn."""
        fields = (self.header.fields.get(key) for key in _END_FIELDS)
        named = [field.value for field in fields if field is not None and isinstance(field.value, int)]
        turn = () if self.chat.end_of_turn is None else (self.chat.end_of_turn,)
        return tuple(dict.fromkeys((*named, *turn)))

    def showing(self, texts: Iterable[str]) -> "Speech":
        """Return this speech with the special tokens that `texts` are made of as tokens that are read and shown."""
        given = list(texts)
        if given and (visible := _visible_tokens(self.header, self.chat.template, given)):
            told = f"{len(visible)} special tokens are read and shown like text, as the examples or labels have them: "
            header = replace(self.header, fields=_with_visible(self.header.fields, visible))
            return replace(self, header=header, warnings=(*self.warnings, told + _shown(visible)))
        if not given and (unexplained := _unexplained_tokens(self.header, self.chat.template)):
            told = (
                f"{len(unexplained)} special tokens at the end of the vocabulary are used by nothing "
                f"({_shown(unexplained)}), and answers never show special tokens: if these are answers, give "
                "--examples, or a --manifest with them as labels"
            )
            return replace(self, warnings=(*self.warnings, told))
        return self


def speech_folders(origin: Path | None, adapter: Path | None) -> Folders:
    """The folders for a model made of the tokenizer's folder `origin` and an `adapter`. Raises TemplateInvalid."""
    tokenizer = adapter if adapter is not None and has_tokenizer(adapter) else origin
    has_template = adapter is not None and folder_format(adapter) is not None
    return Folders(tokenizer, adapter if has_template else origin)


def speech_of(header: Header, source: Checkpoint | None, adapter: Path | None) -> Speech:
    """The speech of a model with the base `header`, which `source` holds if it is open, and an `adapter`.

    Raises AdapterInvalid for an adapter with another model's tokenizer, TokenizerInvalid, TemplateInvalid.
    """
    # a cut base has other ids than any tokenizer
    if adapter is None or not has_tokenizer(adapter) or KEPT_FIELD in header.fields:
        chat = choose_format(header, adapter)
        if isinstance(source, HfCheckpoint) and adapter is not None and folder_format(adapter) is not None:
            assert chat.template is not None, "the adapter has one"
            chat = replace(chat, template=source.template_rules.written(chat.template))
        return Speech(header, chat, {})
    folder = source if isinstance(source, HfCheckpoint) else None
    config = dict(folder.config) if folder is not None else _config_of(header)
    generation = read_object(header.path / GENERATION_CONFIG) if folder is not None else {}
    of_base = BaseFormat(choose_format(header, None), generation)
    vocabulary = read_vocabulary(adapter, config, header.n_vocab, of_base=of_base)
    added = _added(header, vocabulary.fields, adapter)
    kept = {key: field for key, field in header.fields.items() if not key.startswith(_PREFIX)}
    fields = {**kept, **vocabulary.fields}
    if (name := fields.get("general.name")) is not None:
        fields["general.name"] = Field.string(general_name(str(name.value), vocabulary.name_part))
    spoken = replace(header, fields=fields)
    warnings = list(vocabulary.warnings)
    if added:
        warnings.append(f"{len(added)} tokens are the adapter's own, as its tokenizer spells them: {_shown(added)}")
    return Speech(spoken, choose_format(spoken, None), added, tuple(warnings))


def check_speakable(speech: Speech, adapter: Path, labels: Sequence[str]) -> None:
    """Raise AdapterInvalid if an adapter needs tokens that its base, served with its own tokenizer, cannot give it."""
    if speech.added:
        raise AdapterInvalid(
            f"the tokenizer in {str(adapter)!r} has {len(speech.added)} tokens that the base lacks "
            f"({_shown(speech.added)}), which is served with its own: only a merged model can have them: "
            "leave out --hot"
        )
    if hidden := _visible_tokens(speech.header, speech.chat.template, labels):
        raise AdapterInvalid(
            f"{len(hidden)} labels are special tokens of the base ({_shown(hidden)}), which answers never show: only a "
            "merged model can show them: leave out --hot"
        )


def _config_of(header: Header) -> dict[str, Any]:
    """The facts of a GGUF that config.json gives for a folder."""
    fields = {key: header.fields[key].value for key in _END_FIELDS if key in header.fields}
    architecture = header.architecture
    return {"model_type": architecture, "eos_token_id": [value for value in fields.values() if isinstance(value, int)]}


def _added(header: Header, fields: Mapping[str, Field], adapter: Path) -> dict[int, str]:
    """The tokens with another text than in the base. Raises AdapterInvalid if ordinary ones are among them."""
    before, after = (found[TOKENS].strings or [] for found in (header.fields, fields))
    kinds = [np.asarray(found[_TYPES].numbers or ()) for found in (header.fields, fields) if _TYPES in found]
    pairs = enumerate(zip(before, after, strict=True))
    changed = [index for index, (old, new) in pairs if old != new and old.replace(_MARK, b" ") != new]
    if len(kinds) == 2:
        ordinary = np.isin(kinds[0], _ORDINARY) & np.isin(kinds[1], _ORDINARY)
        if wrong := [index for index in changed if ordinary[index]]:
            first = wrong[0]
            raise AdapterInvalid(
                f"the tokenizer in {str(adapter)!r} is another model's: {len(wrong)} ordinary tokens differ from those "
                f"of the base {str(header.path)!r}, such as {first}: {after[first].decode(errors='replace')!r}, there "
                f"{before[first].decode(errors='replace')!r}"
            )
        changed = [index for index in changed if kinds[1][index] != TokenType.UNUSED]
    return {index: after[index].decode(errors="replace") for index in changed}


def _visible_tokens(header: Header, template: str | None, texts: Iterable[str]) -> dict[int, str]:
    """The control tokens, by id, that `texts` are made of; none of the chat template's, and none with a role."""
    special = _control(header, template)
    if not special:
        return {}
    # one look-up for each length: a vocabulary may have thousands of special tokens
    lengths, first = sorted({len(token) for token in special}, reverse=True), {token[0] for token in special}
    found: set[str] = set()
    for text in texts:
        places = (place for place, character in enumerate(text) if character in first)
        ends = ((place, place + length) for place in places for length in lengths)
        found |= {text[start:end] for start, end in ends if text[start:end] in special}
    return {special[text]: text for text in sorted(found, key=special.__getitem__)}


def _unexplained_tokens(header: Header, template: str | None) -> dict[int, str]:
    """The control tokens at the end of the vocabulary that nothing uses: maybe labels."""
    special = _control(header, template)
    if not special:
        return {}
    kinds = np.asarray(header.fields[_TYPES].numbers or ())
    normal = np.flatnonzero(kinds == TokenType.NORMAL)
    last = normal[-1] if normal.size else -1
    return {index: text for text, index in special.items() if index > last and not _USUAL.fullmatch(text)}


def _with_visible(fields: Mapping[str, Field], tokens: Iterable[int]) -> dict[str, Field]:
    """`fields` with `tokens` as user-defined ones."""
    kinds = np.array(fields[_TYPES].numbers or (), np.int32)
    kinds[list(tokens)] = TokenType.USER_DEFINED
    return {**fields, _TYPES: Field.int32_array(kinds.tolist())}


def _shown(tokens: Mapping[int, str]) -> str:
    """The texts of `tokens` for a message."""
    texts = [repr(text) for text in tokens.values()]
    return ", ".join(texts[:_SHOWN]) + (" …" if len(texts) > _SHOWN else "")


def _control(header: Header, template: str | None) -> dict[str, int]:
    """Text -> id of the control tokens that have no role and that the template does not write."""
    if TOKENS not in header.fields or _TYPES not in header.fields:
        return {}
    kinds = np.asarray(header.fields[_TYPES].numbers or ())
    roles = {field.value for key, field in header.fields.items() if _ROLE.fullmatch(key)}
    indices = [index for index in np.flatnonzero(kinds == TokenType.CONTROL).tolist() if index not in roles]
    texts = header.fields[TOKENS].strings_at(indices)
    control = {text.decode(errors="replace"): index for index, text in texts.items() if text.strip()}
    return {text: index for text, index in control.items() if text not in ENDS_BY_TEXT and text not in (template or "")}
