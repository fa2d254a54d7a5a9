"""Special tokens that answers are made of: labels and marks that a fine-tune added as special tokens.

llama.cpp neither shows a control token nor reads one in a message, so an answer that is one would be empty, and a label
would be spelled in letters, which the model never learned. A user-defined token is read and shown, as one token.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from convert.tokenizer.pieces import TokenType
from convert.tokenizer.special import ENDS_BY_TEXT
from models.gguf.fields import TOKENS, Field
from models.gguf.header import Header

_TYPES = "tokenizer.ggml.token_type"
_ROLE = re.compile(r"tokenizer\.ggml\.\w+_token_id")
# Kinds of special token that published vocabularies have at their end, none of them an answer.
_USUAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|.*(image|audio|video|vision|soft_token|fim|pad|mask|unused|reserved|extra_id).*", re.I
)
_SHOWN = 4


def visible_tokens(header: Header, template: str | None, texts: Iterable[str]) -> dict[int, str]:
    """The control tokens, by id, that `texts` are made of; none of the chat template's, and none with a role."""
    special = _control(header, template)
    if not special:
        return {}
    found = set[str]().union(*(_spelled(text, special) for text in texts))
    return {special[text]: text for text in sorted(found, key=special.__getitem__)}


def unexplained_tokens(header: Header, template: str | None) -> dict[int, str]:
    """The control tokens at the end of the vocabulary that nothing uses: maybe labels."""
    kinds = np.asarray(header.fields[_TYPES].numbers or ()) if _TYPES in header.fields else np.empty(0)
    last = max(np.flatnonzero(kinds == TokenType.NORMAL), default=-1)
    special = _control(header, template)
    return {index: text for text, index in special.items() if index > last and not _USUAL.fullmatch(text)}


def with_visible(fields: Mapping[str, Field], tokens: Iterable[int]) -> dict[str, Field]:
    """`fields` with `tokens` as user-defined ones."""
    kinds = np.array(fields[_TYPES].numbers or (), np.int32)
    kinds[list(tokens)] = TokenType.USER_DEFINED
    return {**fields, _TYPES: Field.int32_array(kinds.tolist())}


def shown(tokens: Mapping[int, str]) -> str:
    """The texts of `tokens` for a message."""
    texts = [repr(text) for text in tokens.values()]
    return ", ".join(texts[:_SHOWN]) + (" …" if len(texts) > _SHOWN else "")


def _spelled(text: str, special: Mapping[str, int]) -> set[str]:
    """The special tokens in `text`. One look-up for each length: a vocabulary may have thousands of them."""
    lengths = sorted({len(token) for token in special}, reverse=True)
    first = {token[0] for token in special}
    places = (place for place, character in enumerate(text) if character in first)
    ends = ((place, place + length) for place in places for length in lengths)
    return {text[start:end] for start, end in ends if text[start:end] in special}


def _control(header: Header, template: str | None) -> dict[str, int]:
    """Text -> id of the control tokens that have no role and that the template does not write."""
    if TOKENS not in header.fields or _TYPES not in header.fields:
        return {}
    texts, kinds = header.fields[TOKENS].strings or [], np.asarray(header.fields[_TYPES].numbers or ())
    roles = {field.value for key, field in header.fields.items() if _ROLE.fullmatch(key)}
    indices = [index for index in np.flatnonzero(kinds == TokenType.CONTROL).tolist() if index not in roles]
    control = {texts[index].decode(errors="replace"): index for index in indices if texts[index].strip()}
    return {text: index for text, index in control.items() if text not in ENDS_BY_TEXT and text not in (template or "")}
