"""The form that an answer is held to: what its body asks for, as one grammar over the model's vocabulary.

A JSON schema is closed first (`decoding/schema.py`) and written with the white space that the model was trained on.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from msgspec import structs

from runtime.decoding.grammar import is_regex, judge_schema
from runtime.decoding.schema import closed, without_unusable
from runtime.errors import InvalidRequest, TemplateFailed
from runtime.llama.interface import TokenizerLike
from runtime.openai.chat import Body, ChatBody, grammar_of
from runtime.openai.tool_calls import ToolFormat, probe, recognise, tool_grammar
from runtime.prompt.prompter import Prompter
from runtime.requests import Grammar, Request

from .model import ServedModel

_log = logging.getLogger("deskside.server")
_UNKNOWN_KEYS = re.compile(r"Unimplemented keys: (\[.*\])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The grammar of an answer, and the parts of its schemas that are `not_enforced`, by field.

    `calls` is the format of the tool calls that it may hold; `spelled` are the control tokens kept in its text.
    """

    grammar: Grammar
    calls: ToolFormat | None = None
    spelled: tuple[int, ...] = ()
    calls_first: bool = False
    not_enforced: tuple[str, ...] = ()

    def hold(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests, held to the form."""
        mark = self.calls.marker or self.calls.lead if self.calls else ""
        first = self.calls is not None and (self.calls_first or not self.calls.marker)
        held = []
        for request in requests:
            params = structs.replace(
                request.params, grammar=self.grammar, spelled=self.spelled, call_mark=mark, calls_first=first
            )
            held.append(structs.replace(request, params=params))
        return tuple(held)


@dataclass(frozen=True, slots=True)
class AskedSchema:
    """A schema of the body: the field that holds it, its JSON, and whether it is strict and written compactly."""

    param: str
    source: str
    strict: bool
    compact: bool = False

    @property
    def closed(self) -> str:
        """The schema as llguidance takes it."""
        return closed(self.source, compact=self.compact, strict=self.strict)


FormBuilder = Callable[[Mapping[str, str]], AnswerForm]
"""Makes the form of an answer from its schemas, each closed, by field."""


def prepare_form(body: Body, model: ServedModel) -> AnswerForm | None:
    """Find the form that the body asks for and compile its grammar; None if it asks for none.

    The form names the parts of a schema that cannot be enforced. Raises InvalidRequest if such a part is in a strict
    schema, or if the model cannot write in this form.
    """
    text = grammar_of(body)
    asked: list[AskedSchema] = []
    must_call = isinstance(body, ChatBody) and body.tool_choice.mode == "required"
    if text is not None and text.kind == "json_schema" and not must_call:
        compact = model.manifest is not None and model.manifest.compact_json
        asked.append(AskedSchema(text.param, text.source, text.strict, compact))
    if isinstance(body, ChatBody) and body.callable_tools:
        asked += _schemas_of_tools(body)
        build = _with_calls(body, text, model)
    elif text is not None:
        build = partial(_plain, text)
    else:
        return None
    try:
        form = build({one.param: one.closed for one in asked})
        model.grammars.compile(form.grammar)
        if not model.grammars.not_enforced(form.grammar):
            return form
    except InvalidRequest:
        if not asked:
            raise
    return _as_far_as_can_be(asked, build, model)


def _as_far_as_can_be(asked: Sequence[AskedSchema], build: FormBuilder, model: ServedModel) -> AnswerForm:
    """The form with each schema judged by itself. Raises InvalidRequest that names the schema's field."""
    sources, notes = {}, list[str]()
    for one in asked:
        sources[one.param], lost = _judged(one)
        if lost:
            notes.append(f"{one.param}: {', '.join(lost)}")
    form = replace(build(sources), not_enforced=tuple(notes))
    model.grammars.compile(form.grammar)
    return form


@lru_cache(32)
def _judged(asked: AskedSchema) -> tuple[str, tuple[str, ...]]:
    """The schema as far as it can be enforced, and what cannot be. Logged once while it is in use."""
    source = asked.closed
    fault, said = judge_schema(source)
    lost: list[str] = []
    if fault is not None and not asked.strict:
        reduced, lost = without_unusable(asked.source, is_regex)
        source = replace(asked, source=reduced).closed
        fault, said = judge_schema(source)
    if fault is not None:
        message = f"{asked.param} cannot be used as a JSON schema"
        if asked.strict and (names := _names(fault)) != [fault[:100]]:
            message = f"{asked.param} is strict, but holds what cannot be enforced: {', '.join(names)}"
            raise InvalidRequest(f"{message}; leave that or strict out", param=asked.param, code="invalid_grammar")
        raise InvalidRequest(f"{message}: {fault}", param=asked.param, code="invalid_grammar")
    lost += (name for warning in said for name in _names(warning))
    if lost:
        _log.warning("%s: not enforced, because the schema is not strict: %s", asked.param, ", ".join(lost)[:500])
    return source, tuple(lost)


def _names(said: str) -> list[str]:
    """The parts of a schema that llguidance names in a warning or an error."""
    if keys := _UNKNOWN_KEYS.search(said):
        return [str(name) for name in json.loads(keys[1])]
    if said.startswith("Unknown format: "):
        return [f"format {said.removeprefix('Unknown format: ')}"]
    if said.startswith("oneOf"):
        return ["oneOf (taken as anyOf)"]
    return [said[:100]]


def _plain(text: Grammar, schemas: Mapping[str, str]) -> AnswerForm:
    return AnswerForm(structs.replace(text, source=schemas.get(text.param, text.source)))


def _schemas_of_tools(body: ChatBody) -> list[AskedSchema]:
    """The schemas of the callable functions. Chat templates write JSON with white space, even if examples do not."""
    return [
        AskedSchema(_param_of(place), tool.function.text_of_arguments, tool.function.strict is True)
        for place, tool in enumerate(body.callable_tools)
        if body.tool_choice.allows(tool.function.name)
    ]


def _param_of(place: int) -> str:
    return f"tools[{place}].function.parameters"


def _with_calls(body: ChatBody, text: Grammar | None, model: ServedModel) -> FormBuilder:
    """Calls to the body's tools, or a text. Raises InvalidRequest if the model writes calls in an unknown way."""
    form = recognise(*example_call(model.prompter), model.prompter.template_text)
    if form is None:
        message = f"model {model.name!r} cannot call tools here: its chat template writes calls in an unknown format"
        raise InvalidRequest(message, param="tools", code="unsupported_parameter")
    if text is not None and text.kind != "json_schema":
        model.grammars.compile(text)  # a fault of its own has its own name
    control = control_tokens(form, model.tokenizer)
    choice = body.tool_choice
    must_call = choice.mode == "required"

    def build(schemas: Mapping[str, str]) -> AnswerForm:
        arguments = {tool.function.name: schemas.get(_param_of(n)) for n, tool in enumerate(body.callable_tools)}
        grammar = tool_grammar(
            form,
            {name: schema for name, schema in arguments.items() if schema is not None},
            control,
            must_call=must_call,
            parallel=body.parallel_tool_calls and not choice.named,
            text=None if text is None else _plain(text, schemas).grammar,
        )
        return AnswerForm(grammar, form, tuple(control.values()), calls_first=text is not None and not must_call)

    return build


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
