"""The form of an answer: the constraints in its body, as one grammar over the model's vocabulary.

A JSON schema is closed first (`decoding/schema.py`) and written with the white space that the model was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import structs

from runtime.decoding.schema import closed
from runtime.errors import InvalidRequest, TemplateFailed
from runtime.llama.interface import TokenizerLike
from runtime.openai.chat import Body, ChatBody, grammar_of
from runtime.openai.tool_calls import ToolFormat, probe, recognise, tool_grammar
from runtime.prompt.prompter import Prompter
from runtime.requests import Grammar, Request

from .model import ServedModel


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The grammar of an answer; if it may hold calls, their format and the control tokens kept in its text."""

    grammar: Grammar
    calls: ToolFormat | None = None
    spelled: tuple[int, ...] = ()

    def hold(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests with the grammar, and with the control tokens that stay in the text."""
        params = (structs.replace(request.params, grammar=self.grammar, spelled=self.spelled) for request in requests)
        return tuple(structs.replace(request, params=params) for request, params in zip(requests, params, strict=True))


def prepare_form(body: Body, model: ServedModel) -> AnswerForm | None:
    """Find the form that the body asks for and compile its grammar; None if it asks for none.

    Raises InvalidRequest if the model cannot write in this form.
    """
    form = _with_calls(body, model) if isinstance(body, ChatBody) and body.callable_tools else _plain(body, model)
    if form is not None:
        model.grammars.compile(form.grammar)
    return form


def require_tools(body: ChatBody, model: ServedModel) -> None:
    """Raise InvalidRequest if the body names tools or calls, and the model's chat template has no place for them."""
    tools = body.callable_tools
    names_a_call = next(
        (n for n, message in enumerate(body.messages) if message.tool_calls or message.tool_call_id), None
    )
    if (tools or names_a_call is not None) and not model.prompter.takes_tools:
        message = f"model {model.name!r} cannot call tools: its chat template has no place for them"
        param = "tools" if tools else f"messages[{names_a_call}]"
        raise InvalidRequest(message, param=param, code="unsupported_parameter")


def _plain(body: Body, model: ServedModel) -> AnswerForm | None:
    grammar = grammar_of(body)
    if grammar is None:
        return None
    if grammar.kind == "json_schema":
        compact = model.manifest is not None and model.manifest.compact_json
        grammar = structs.replace(grammar, source=closed(grammar.source, compact=compact))
    return AnswerForm(grammar)


def _with_calls(body: ChatBody, model: ServedModel) -> AnswerForm:
    """The form of calls to the body's tools. Raises InvalidRequest if the model writes calls in an unknown format."""
    form = recognise(*example_call(model.prompter), model.prompter.template_text)
    if form is None:
        message = f"model {model.name!r} cannot call tools here: its chat template writes calls in an unknown format"
        raise InvalidRequest(message, param="tools", code="unsupported_parameter")
    control = control_tokens(form, model.tokenizer)
    choice = body.tool_choice
    functions = [tool.function for tool in body.callable_tools if choice.allows(tool.function.name)]
    grammar = tool_grammar(
        form,
        # Chat templates write JSON with white space, even if the model's own examples do not.
        {function.name: closed(function.text_of_arguments) for function in functions},
        control,
        must_call=choice.mode == "required",
        parallel=body.parallel_tool_calls and not choice.named,
    )
    return AnswerForm(grammar, form, tuple(control.values()))


def example_call(prompter: Prompter) -> tuple[str, str]:
    """Render a conversation with a call: all of it, and the part that begins with the model's turn.

    Both are empty if the chat template cannot write one.
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
    """The texts of a format that are control tokens of this model: text -> token id."""
    found = {}
    for text in tokenizer.special_texts:
        if any(text in piece for piece in form.pieces):
            tokens = tokenizer.encode(text, add_special=False, parse_special=True)
            if len(tokens) == 1 and not tokenizer.token_bytes(tokens[0]):
                found[text] = tokens[0]
    return found
