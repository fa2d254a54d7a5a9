"""A chat's tools, made ready for one model: how it writes calls, and the grammar that holds it to them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import InvalidRequest, TemplateFailed
from .llama_protocol import TokenizerLike
from .openai import ChatBody
from .openai_tool_formats import ToolFormat, probe, recognise, tool_grammar
from .prompt import Prompter
from .sequence import Grammar, Request


class Calling(Protocol):
    """What preparing tools needs of a served model."""

    @property
    def name(self) -> str:
        """The name clients call it by."""

    @property
    def prompter(self) -> Prompter:
        """Renders and tokenises."""

    @property
    def tokenizer(self) -> TokenizerLike:
        """Its tokenizer."""


@dataclass(frozen=True, slots=True)
class PreparedTools:
    """How the model writes calls, the grammar of its answer, and the control tokens to be read in it."""

    form: ToolFormat
    grammar: Grammar
    spelled: tuple[int, ...]

    def constrained(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests, held to the grammar."""
        params = (replace(request.params, grammar=self.grammar, spelled=self.spelled) for request in requests)
        return tuple(replace(request, params=params) for request, params in zip(requests, params, strict=True))


def prepare_tools(body: ChatBody, served: Calling) -> PreparedTools | None:
    """What the body's tools ask for; None if nothing may be called.

    Raises InvalidRequest if the model's chat template has no place for tools, or writes calls in an unknown way.
    """
    tools = body.callable_tools
    told_of_tools = next(
        (n for n, message in enumerate(body.messages) if message.tool_calls or message.tool_call_id), None
    )
    if (tools or told_of_tools is not None) and not served.prompter.takes_tools:
        message = f"model {served.name!r} cannot call tools: its chat template has no place for them"
        param = "tools" if tools else f"messages[{told_of_tools}]"
        raise InvalidRequest(message, param=param, code="unsupported_parameter")
    if not tools:
        return None
    form = recognise(*example_call(served.prompter), served.prompter.template_text)
    if form is None:
        message = f"model {served.name!r} cannot call tools here: its chat template writes calls in an unknown format"
        raise InvalidRequest(message, param="tools", code="unsupported_parameter")
    control = control_tokens(form, served.tokenizer)
    choice = body.tool_choice
    may_call = [tool for tool in tools if choice.name in (None, tool.function.name)]
    grammar = tool_grammar(
        form,
        may_call,
        control,
        must_call=choice.mode == "required",
        parallel=body.parallel_tool_calls and choice.name is None,
    )
    return PreparedTools(form, grammar, tuple(control.values()))


def example_call(prompter: Prompter) -> tuple[str, str]:
    """A conversation with a call as the chat template writes it, and that from where the model's turn begins.

    Both are empty if it cannot write one.
    """
    turns, tools = probe()
    extra = {"tools": tools}
    try:
        before = prompter.render(turns[:1], extra=extra)
        whole = prompter.render(turns, extra=extra, add_generation_prompt=False)
    except (InvalidRequest, TemplateFailed):
        return "", ""
    return whole, whole.removeprefix(before.rstrip())


def control_tokens(form: ToolFormat, tokenizer: TokenizerLike) -> dict[str, int]:
    """Which texts of a format are control tokens to this model, and which."""
    found = {}
    for text in tokenizer.special_texts:
        if any(text in piece for piece in form.pieces):
            tokens = tokenizer.encode(text, add_special=False, parse_special=True)
            if len(tokens) == 1 and not tokenizer.token_bytes(tokens[0]):
                found[text] = tokens[0]
    return found
