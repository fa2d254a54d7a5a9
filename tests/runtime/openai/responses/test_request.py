"""The wire of `/v1/responses`, without a server: each row of its field table, and what chat each body asks for."""

import json
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.openai.chat import MAX_MESSAGES, ChatBody, parse
from runtime.openai.fields import LOGPROBS, RESPONSE_FIELDS, FieldRule, below
from runtime.openai.responses.request import (
    MAX_METADATA,
    MAX_METADATA_VALUE_CHARS,
    PASSED,
    ResponseBody,
    parse_response,
)
from runtime.openai.tools import MAX_TOOLS, ToolChoice

TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
# A value of each used field, and what of the chat's body says it.
USED: dict[str, tuple[Any, str, Any]] = {
    "model": ("m", "model", "m"),
    "stream": (True, "stream", True),
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.5, "top_p", 0.5),
    "parallel_tool_calls": (False, "parallel_tool_calls", False),
    "seed": (7, "seed", 7),
    "top_k": (3, "top_k", 3),
    "min_p": (0.5, "min_p", 0.5),
    "presence_penalty": (1.0, "presence_penalty", 1.0),
    "frequency_penalty": (1.0, "frequency_penalty", 1.0),
    "max_output_tokens": (9, "max_completion_tokens", 9),
    "include": ([LOGPROBS], "logprobs", True),
}


def chat_of(**fields: Any) -> ChatBody:
    body = parse("chat", dict(parse_response({"input": "hi"} | fields).chat))
    assert isinstance(body, ChatBody)
    return body


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_response({"input": "hi"} | fields)
    return caught.value


ROWS = below(RESPONSE_FIELDS).values()


@pytest.mark.parametrize("rule", ROWS, ids=lambda rule: rule.name)
def test_each_row_of_the_field_table_is_treated_as_it_says(rule: FieldRule) -> None:
    plain = parse_response({"input": "hi"})
    if rule.name != "input":
        assert parse_response({"input": "hi", rule.name: None}) == plain
    anything: tuple[Any, ...] = ("x", 17, {"a": 1}, [{}])
    if rule.treatment == "ignored":
        for value in (*anything, True, False):
            assert parse_response({"input": "hi", rule.name: value}) == plain
    elif rule.treatment == "refused":
        for value in rule.accepts:
            assert parse_response({"input": "hi", rule.name: value}) == plain
        for value in anything:
            error = refusal(**{rule.name: value})
            assert (error.param, error.code) == (rule.name, "unsupported_parameter")
    else:
        assert rule.name in PASSED or rule.name in ResponseBody.model_fields


def test_what_is_read_is_what_the_table_calls_used() -> None:
    used = [rule.name for rule in ROWS if rule.treatment == "used"]
    assert sorted(used) == sorted({*PASSED, *ResponseBody.model_fields})
    assert refusal(max_tokens=3).code == "unknown_parameter"


@pytest.mark.parametrize("name", USED)
def test_each_field_of_how_to_write_reaches_the_chat(name: str) -> None:
    value, attribute, expected = USED[name]
    assert getattr(chat_of(**{name: value}), attribute) == expected
    assert getattr(chat_of(), attribute) != expected


def test_instructions_and_a_text_are_a_chat() -> None:
    read = [message.model_dump() for message in chat_of(instructions="be brief").messages]
    assert read == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def test_items_are_a_chat() -> None:
    written = {"type": "output_text", "text": "c", "annotations": [], "logprobs": []}
    items = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "!"}]},
        {"type": "message", "role": "assistant", "content": [written], "id": "msg_1", "status": "completed"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": "fc_1", "status": "completed"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
    ]

    def call(call_id: str, name: str, arguments: object) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    assert [message.model_dump() for message in chat_of(input=items).messages] == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b!"},
        {"role": "assistant", "content": "c", "tool_calls": [call("1", "f", {}), call("2", "g", {"a": 1})]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "tool", "content": "y", "tool_call_id": "2"},
    ]


def test_formats_tools_and_choices_have_their_chat_form() -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "array"}, "strict": True}
    formatted = chat_of(text={"format": schema}).response_format
    assert formatted is not None
    assert json.loads(formatted.source) == {"type": "array"}
    assert chat_of(text={"format": {"type": "json_object"}}).response_format is not None
    assert chat_of(text={"format": {"type": "text"}}).response_format is None
    body = chat_of(tools=[TOOL], tool_choice={"type": "function", "name": "f"})
    assert (body.tools[0].function.name, body.tool_choice.names) == ("f", ("f",))
    assert chat_of(tools=[TOOL], tool_choice="required").tool_choice.mode == "required"
    assert chat_of(include=[LOGPROBS], top_logprobs=3).top_logprobs == 3


def test_what_clients_send_of_reasoning_and_formats_changes_nothing() -> None:
    plain = chat_of(input=[{"role": "user", "content": "hi"}])
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x", "content": [{"a": 1}]}
    said = {"role": "user", "content": [{"type": "input_text", "text": "hi"}], "type": None, "unheard_of": None}
    assert chat_of(input=[thought, said], include=["reasoning.encrypted_content"]) == plain
    harmless = {"reasoning": {"effort": None, "summary": "auto"}, "truncation": "auto", "text": {"verbosity": "medium"}}
    assert chat_of(input=[said], stream_options={"include_obfuscation": True}, max_tool_calls=3, **harmless) == plain


def test_some_of_the_tools_may_be_allowed() -> None:
    tools = [TOOL, TOOL | {"name": "g"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    assert chat_of(tools=tools, tool_choice=choice).tool_choice == ToolChoice("required", ("g",))
    assert len(chat_of(tools=tools, tool_choice=choice).callable_tools) == 2


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": 7}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}, "input"),
    ({"input": [7]}, "input[0]"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
    ({"input": [{"type": "function_call_output", "call_id": "1", "output": 7}]}, "input[0].output"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": "x", "more": 1}]}, "input[0].more"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": ["x"]}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
    ({"input": [CALL | {"arguments": {}}]}, "input[0].arguments"),
    ({"input": [CALL | {"name": "a b"}]}, "input[0].name"),
    ({"instructions": ["x"]}, "instructions"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"text": {"format": "json"}}, "text.format"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"style": "x"}}, "text.style"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [TOOL] * (MAX_TOOLS + 1)}, "tools"),
    ({"include": ["reasoning.thoughts"]}, "include[0]"),
    ({"truncation": "middle"}, "truncation"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(n): "x" for n in range(MAX_METADATA + 1)}}, "metadata"),
    ({"metadata": {"a": "x" * (MAX_METADATA_VALUE_CHARS + 1)}}, "metadata"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_a_bad_value_is_refused_with_its_field(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert len(str(error)) < 600


@pytest.mark.parametrize("payload", [None, [], "x", 7])
def test_a_body_that_is_no_object_is_refused(payload: object) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse_response(payload)


ORIGINS = [
    ("messages", "input"),
    ("messages[0].content", "instructions.content"),
    ("messages[1]", "input[0]"),
    ("messages[2].tool_calls[1].id", "input[2].call_id"),
    ("messages[3].tool_call_id", "input[3].call_id"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("tools[3].function.parameters", "tools[3].parameters"),
    ("temperature", "temperature"),
]


@pytest.mark.parametrize(("param", "expected"), ORIGINS)
def test_a_fault_of_the_chat_is_told_of_the_field_it_came_from(param: str, expected: str) -> None:
    result = {"type": "function_call_output", "call_id": "1", "output": ""}
    items = [{"role": "user", "content": "x"}, CALL, CALL | {"call_id": "2"}, result]
    assert parse_response({"instructions": "y", "input": items}).origins.rename(param) == expected
