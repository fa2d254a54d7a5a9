"""Tool calls without a server: which templates take them, what is refused, and calls read out of text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.openai.chat import ChatBody, parse
from runtime.openai.grammar import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from runtime.openai.tool_calls import FORMATS, CallDelta, ToolCallReader, ToolFormat, recognise
from runtime.openai.tools import MAX_CALL_ID_CHARS, MAX_CALLS, MAX_TOOLS, ToolChoice
from runtime.prompt.prompter import Prompter
from runtime.prompt.template import ChatTemplate
from runtime.serving.form import example_call
from tests.support.runtime import tool_templates as templates
from tests.support.runtime.fakes import FakeTokenizer

USER: dict[str, Any] = {"role": "user", "content": "hi"}
F: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> ChatBody:
    body = parse("chat", {"messages": [USER], **fields})
    assert isinstance(body, ChatBody)
    return body


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


def format_of(template: str) -> ToolFormat | None:
    prompter = Prompter(FakeTokenizer(), template, 4096)
    assert prompter.takes_tools
    return recognise(*example_call(prompter), prompter.template_text)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (templates.HERMES, "hermes"),
        (templates.LLAMA, "llama"),
        (templates.JSON, "json"),
        (templates.MISTRAL, "mistral"),
        (templates.MISTRAL_SPACED, "mistral-spaced"),
        (templates.MISTRAL_ARGS, "mistral-args"),
        (templates.GRANITE, "granite"),
        (templates.XML, None),
        (templates.UNKNOWN, None),
        ("{{ tools }}{% if messages[1] %}{{ raise_exception('no calls') }}{% endif %}", None),
        # A prompt that begins the turn with something else does not hide how calls are written.
        (templates.HERMES.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "hermes"),
        # What looks like a bare call stands within something else.
        (templates.JSON.replace('{"name"', '<call>{"name"'), None),
    ],
)
def test_a_template_shows_its_format_by_writing_a_call(template: str, name: str | None) -> None:
    form = format_of(template)
    assert (form and form.name) == name


def test_each_format_has_a_template_in_these_tests() -> None:
    assert {format_of(template) for template in templates.TWO_CALLS} == set(FORMATS)


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        (templates.NO_TOOLS, False),
        ("{% for tools in messages %}{{ tools }}{% endfor %}", False),
        ("{{ messages.tools }} tools", False),
        ("{%- if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% macro said() %}{{ tools }}{% endmacro %}{{ said() }}", True),
        ("{% if tools is not none %}x{% endif %}", True),
    ],
)
def test_only_a_template_that_reads_the_variable_takes_tools(source: str, reads: bool) -> None:
    assert ("tools" in ChatTemplate(source).variables) is reads


FORCED = {"type": "function", "function": {"name": "f"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names or ("f",)]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", ToolChoice("none")),
        ("auto", ToolChoice("auto")),
        ("required", ToolChoice("required")),
        (FORCED, ToolChoice("required", ("f",), named=True)),
        (FORCED | {"function": {"name": "f", "id": None}, "id": None}, ToolChoice("required", ("f",), named=True)),
        (allowed("auto"), ToolChoice("auto", ("f",))),
        (allowed("required"), ToolChoice("required", ("f",))),
    ],
)
def test_the_forms_of_tool_choice(value: Any, expected: ToolChoice) -> None:
    body = chat(tools=[F], tool_choice=value)
    assert body.tool_choice == expected
    assert bool(body.callable_tools) is (value != "none")


def test_a_template_is_given_openais_list() -> None:
    schema = {"properties": {"a": {"type": "integer"}}}
    given = chat(tools=function(description="d", parameters=schema, strict=True)).tools[0].for_template()
    assert given == {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object"} | schema},
    }
    assert chat(tools=[F]).tools[0].for_template()["function"]["parameters"]["properties"] == {}


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"type": "object", "properties": DEEP}

BAD_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": "f"}, "tools"),
    ({"tools": [7]}, "tools[0]"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": function(name="a b")}, "tools[0].function.name"),
    ({"tools": function(name="")}, "tools[0].function.name"),
    ({"tools": function(name="x" * 65)}, "tools[0].function.name"),
    ({"tools": function(name="f\n")}, "tools[0].function.name"),
    ({"tools": function(extra=1)}, "tools[0].function.extra"),
    ({"tools": function(parameters={"type": "string"})}, "tools[0].function.parameters"),
    ({"tools": function(parameters=[])}, "tools[0].function.parameters"),
    ({"tools": function(parameters=DEEP)}, "tools[0].function.parameters"),
    ({"tools": function(parameters={"title": "x" * MAX_GRAMMAR_BYTES})}, "tools"),
    ({"tools": [F] * 2}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(MAX_TOOLS + 1)]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [F], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
    ({"tools": [F], "tool_choice": allowed("none")}, "tool_choice"),
    ({"tools": [F], "tool_choice": allowed("auto", "f", "g")}, "tool_choice"),
    ({"tools": [F], "tool_choice": allowed("auto", *["f"] * (MAX_TOOLS + 1))}, "tool_choice"),
    (
        {"tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [7]}}},
        "tool_choice",
    ),
    ({"tools": [F], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_TOOLS, ids=lambda value: json.dumps(value)[:60])
def test_bad_tools_are_refused_with_their_field(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


def test_the_bounds_themselves_are_allowed() -> None:
    names = [f"{n:x>64}" for n in range(MAX_TOOLS)]
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    assert len(chat(tools=tools, tool_choice="none", stop="x", regex="a").tools) == MAX_TOOLS


def call(call_id: str = "1", arguments: str = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_a_conversation_with_calls_is_read_as_templates_want_it() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [call(arguments='{"a": [1]}')]}
    answer = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "ok"}], "name": "f"}
    read = [message.model_dump() for message in chat(messages=[USER, asked, answer]).messages]
    function = {"name": "f", "arguments": {"a": [1]}}
    assert read[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "content": "ok", "tool_call_id": "1", "name": "f"},
    ]


def test_a_call_without_arguments_may_leave_them_empty() -> None:
    (read,) = chat(messages=[USER, asks(call(arguments=""))]).messages[1].tool_calls
    assert read.for_template()["function"]["arguments"] == {}


BROKEN = [
    '{"city": ',
    "Oslo",
    "[]",
    "null",
    '{"a": NaN}',
    "[" * 100_000,
    '{"a":' * 100 + "1" + "}" * 100,
    '{"a": "\\ud83d"}',
]


@pytest.mark.parametrize("arguments", BROKEN, ids=lambda text: text[:12])
def test_broken_arguments_of_an_earlier_call_are_passed_on_as_text(arguments: str) -> None:
    body = chat(messages=[USER, asks(call(arguments=arguments)), answers("1")])
    assert body.messages[1].tool_calls[0].for_template()["function"]["arguments"] == arguments


def test_an_id_used_again_in_a_later_turn_is_of_the_nearest_earlier_call() -> None:
    unanswered = [asks(call("1"), call("2")), answers("2")]
    again = [asks(call("1")), answers("1"), USER]
    assert len(chat(messages=[USER, *unanswered, *again, *again]).messages) == 9


def asks(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls)}


def answers(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": "x", "tool_call_id": call_id}


BAD_TURNS: list[tuple[list[dict[str, Any]], str]] = [
    ([answers("1")], "messages[0].tool_call_id"),
    ([asks(call("1")), answers("2")], "messages[1].tool_call_id"),
    ([asks(call("1")), answers("1"), answers("1")], "messages[2].tool_call_id"),
    ([answers("1"), asks(call("1"))], "messages[0].tool_call_id"),
    ([asks(call("1"), call("1"))], "messages[0].tool_calls[1].id"),
    ([asks(call("1")), answers("1"), asks(call("1")), answers("1"), answers("1")], "messages[4].tool_call_id"),
    ([asks(call("x" * (MAX_CALL_ID_CHARS + 1)))], "messages[0].tool_calls[0].id"),
    ([asks(*(call(str(n)) for n in range(MAX_CALLS + 1)))], "messages[0].tool_calls"),
    ([asks(call() | {"function": {"name": "f", "arguments": {}}})], "messages[0].tool_calls[0].function.arguments"),
    ([asks({"id": "1", "type": "custom"})], "messages[0].tool_calls[0].type"),
    ([{"role": "user", "content": "x", "tool_calls": [call()]}], "messages[0]"),
    ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages[0]"),
    ([{"role": "tool", "content": "x"}], "messages[0]"),
    ([{"role": "assistant", "tool_calls": []}], "messages[0].content"),
]


@pytest.mark.parametrize(("messages", "param"), BAD_TURNS, ids=lambda value: json.dumps(value)[:60])
def test_calls_and_results_that_do_not_fit_are_refused(messages: list[dict[str, Any]], param: str) -> None:
    assert refusal(messages=messages).param == param


FORMS = {template: form for template in templates.TWO_CALLS if (form := format_of(template))}


def read_in_pieces(template: str, pieces: list[str]) -> tuple[str, list[tuple[str, str, str]]]:
    """The content, and (id, name, arguments) of each call."""
    form = FORMS[template]
    reader = ToolCallReader(form, "r")
    content, calls = "", list[list[str]]()
    for piece in pieces:
        told = reader.feed(piece)
        content += told.content
        for delta in told.calls:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.id, delta.name, ""])
            assert delta.id == calls[delta.index][0]
            calls[delta.index][2] += delta.arguments
    assert reader.n_calls == len(calls)
    return content + reader.finish(), [(i, n, a) for i, n, a in calls]


@settings(max_examples=150)
@given(data=st.data())
def test_calls_are_read_alike_however_the_text_is_cut(data: st.DataObject) -> None:
    template = data.draw(st.sampled_from(list(templates.TWO_CALLS)))
    marked = template not in (templates.LLAMA, templates.JSON)
    before = data.draw(st.sampled_from(["", "Let me see <tool", "[TOOL \n x"])) if marked else ""
    text = before + templates.TWO_CALLS[template]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = read_in_pieces(template, pieces)
    assert content == before
    expected = [("f", '{"city": "Oslo"}'), ("g", "{}")]
    assert [(name, arguments) for _, name, arguments in calls] == expected[: 2 if marked else 1]
    assert (content, calls) == read_in_pieces(template, [text])


@pytest.mark.parametrize("text", ["plain", "", " a <tool_cal", "<", "x\n\n", "a < b <tool_x>"])
def test_text_without_a_call_is_content_to_the_letter(text: str) -> None:
    for template in templates.TWO_CALLS:
        for pieces in ([text], list(text)):
            assert read_in_pieces(template, pieces) == (text, [])


def test_brackets_and_quotes_in_arguments_do_not_end_them() -> None:
    arguments = json.dumps({"a": 'x"}}</tool_call>\\', "b": [{"c": "]"}]})
    text = 'ok\n<tool_call>\n{"name": "f", "arguments": ' + arguments + "}\n</tool_call>"
    content, calls = read_in_pieces(templates.HERMES, list(text))
    assert (content, calls[0][1:]) == ("ok", ("f", arguments))


def test_ids_differ_between_answers_and_keep_the_length_a_template_wants() -> None:
    forms = {form.name: form for form in FORMATS}
    ids = set()
    for request in ("a", "b"):
        reader = ToolCallReader(forms["mistral"], request)
        told = reader.feed(templates.TWO_CALLS[templates.MISTRAL])
        ids |= {delta.id for delta in told.calls}
        assert told.calls[0] == CallDelta(0, told.calls[0].id, "f", '{"city": "Oslo"}')
    assert len(ids) == 4
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
