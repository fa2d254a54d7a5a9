"""The proof that a converted model is asked as the checkpoint was: the same rendered prompts, the same token ids.

Hugging Face's rule is: render the template, then tokenise the text without adding special tokens again, so that no BOS
stands there twice. It is followed here with plain Jinja and the reference tokenizer, beside the prompts as served.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError

from convert.errors import VerifyFailed
from convert.tokenizer.chat_template import TEMPLATE_FIELD, folder_format, template_environment
from convert.tokenizer.pieces import TOKENIZER_CONFIG, read_object
from convert.tokenizer.special import token_text
from runtime.errors import EngineError, RequestError
from runtime.prompt.prompter import Prompter

from .parity import Mismatch, TokenizerPair
from .reference import ReferenceTokenizer
from .torture import CONVERSATIONS

ChatMessages = Sequence[Mapping[str, Any]]

_CONTEXT_TOKENS = 1 << 24
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TemplateParity:
    """The number of conversations that came out alike, and notes for the user."""

    n_compared: int
    warnings: tuple[str, ...] = ()


def check_template(pair: TokenizerPair, conversations: Sequence[ChatMessages]) -> TemplateParity:
    """Compare prompts as served with those of the folder's template and tokenizer, built-in conversations included.

    A conversation ends with the user's turn. One in which a message spells a special token is skipped: as served, that
    is text. Raises VerifyFailed with the first prompt that differs; a model without a template has nothing to compare.
    """
    chat, tokenizer, reference = folder_format(pair.folder), pair.tokenizer, pair.reference
    template = pair.fields.get(TEMPLATE_FIELD)
    text = template.value if template is not None and isinstance(template.value, str) else None
    if chat is None or chat.template is None or text is None:
        return TemplateParity(0)
    special = reference.special | pair.forced
    prompter = Prompter(tokenizer, text, _CONTEXT_TOKENS)
    render = _renderer(chat.template, pair.folder)
    compared, extra_bos = 0, False
    for conversation in (*conversations, *CONVERSATIONS):
        plain = [{**message, "content": reference.comparable(str(message.get("content")))} for message in conversation]
        if any(mark in str(message.get("content")) for message in plain for mark in special):
            continue
        if (expected := render(plain)) is None:
            continue
        try:
            ours = prompter.render(plain)
            tokens = list(prompter.chat(plain))
        except (EngineError, RequestError) as error:
            raise VerifyFailed(f"the template refuses a conversation that it took before: {error}") from error
        extra_bos |= _compare(ours, tokens, expected, reference, tokenizer.bos)
        compared += 1
    told = ("the template writes no BOS: it is added as to any text, training may have gone without it",)
    return TemplateParity(compared, told if extra_bos else ())


def _compare(ours: str, tokens: list[int], expected: str, reference: ReferenceTokenizer, bos: int | None) -> bool:
    """Raise VerifyFailed unless text and ids are Hugging Face's; true when ours have a BOS that the template omits."""
    if ours != expected:
        raise VerifyFailed(f"the rendered prompt is {ours!r:.200}, Hugging Face's is {expected!r:.200}")
    theirs = reference.encode_rendered(ours)
    extra = tokens[:1] == [bos] and theirs[:1] != [bos]
    if tokens[extra:] != theirs:
        raise VerifyFailed(f"a prompt gets other tokens than before: {Mismatch(ours, tuple(tokens), tuple(theirs))}")
    return extra


def _renderer(template: str, folder: Path) -> Callable[[ChatMessages], str | None]:
    """A function from a conversation to its prompt, or None where the template refuses it."""
    environment = template_environment()
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    config = read_object(folder / TOKENIZER_CONFIG)
    tokens = {name: text for name in _NAMED_TOKENS if (text := token_text(config.get(name)))}
    compiled = environment.from_string(template)

    def render(conversation: ChatMessages) -> str | None:
        try:
            # transformers gives both, none of them, to every template
            given = {"messages": conversation, "tools": None, "documents": None, **tokens}
            return compiled.render(add_generation_prompt=True, **given)
        except (TemplateError, TypeError):
            return None

    return render


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
