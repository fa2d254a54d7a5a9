"""The wire fields of structured output, without a server: what they become, and what is refused."""

import json
from typing import Any

import pytest

from runtime.errors import InvalidRequest
from runtime.openai.chat import MAX_ANSWERS_PER_CALL, TokenizedPrompt, parse, to_requests
from runtime.openai.grammar import MAX_CHOICE_TEXTS, MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from runtime.openai.wire import Endpoint
from runtime.requests import Grammar

MINIMAL: dict[Endpoint, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "hi"}]},
    "completion": {"prompt": "hi"},
}
SCHEMA = {"type": "object", "properties": {"ä": {"type": "string"}}}


def grammars_of(kind: Endpoint, **fields: Any) -> list[Grammar | None]:
    body = parse(kind, MINIMAL[kind] | fields)
    prompts = [TokenizedPrompt((1,), 9)]
    return [request.params.grammar for request in to_requests(body, "c", prompts, range(MAX_ANSWERS_PER_CALL))]


def refusal(kind: Endpoint, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, MINIMAL[kind] | fields)
    return caught.value


def formatted(schema: object, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "mail", "schema": schema} | more}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_extensions_reach_every_choice(kind: Endpoint) -> None:
    asked = Grammar("regex", "a+", "regex")
    assert grammars_of(kind, regex="a+", n=3) == [asked] * 3
    assert grammars_of(kind, grammar='start: "a"') == [Grammar("lark", 'start: "a"', "grammar")]
    assert grammars_of(kind, choice=["é", "b"]) == [Grammar("choice", '["é", "b"]', "choice")]
    assert grammars_of(kind, choice=None, regex=None) == [None]


def test_response_format_is_a_schema_or_nothing() -> None:
    (plain,) = grammars_of("chat", response_format={"type": "text"})
    assert plain is None
    (any_object,) = grammars_of("chat", response_format={"type": "json_object"})
    assert any_object == Grammar("json_schema", '{"type": "object"}', "response_format")
    (described,) = grammars_of("chat", response_format={"type": "json_object", "schema": SCHEMA})
    assert described is not None
    assert (described.kind, json.loads(described.source)) == ("json_schema", SCHEMA)
    for more in ({}, {"strict": True}, {"strict": None, "description": "of a mail"}):
        (asked,) = grammars_of("chat", response_format=formatted(SCHEMA, **more))
        assert asked is not None
        assert (asked.kind, json.loads(asked.source), asked.param) == ("json_schema", SCHEMA, "response_format")


def test_response_format_is_the_chats_alone() -> None:
    assert refusal("completion", response_format={"type": "text"}).code == "unknown_parameter"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("response_format", "json", "object"),
        ("response_format", {"type": "xml"}, "json_schema"),
        ("response_format", {}, "json_schema"),
        ("response_format", {"type": "json_object", "schema": "x"}, "JSON schema"),
        ("response_format", {"type": "text", "schema": {}}, "'schema'"),
        ("response_format", {"type": "json_schema"}, "json_schema"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
        ("response_format", formatted(True), "schema"),
        ("response_format", formatted(SCHEMA, grammar="x"), "'grammar'"),
        ("grammar", "", "Lark"),
        ("grammar", {"lark": "x"}, "Lark"),
        ("regex", "", "regular expression"),
        ("regex", 7, "regular expression"),
        ("choice", [], "non-empty"),
        ("choice", "spam", "list"),
        ("choice", ["a", ""], "non-empty"),
        ("choice", ["a", 1], "strings"),
    ],
)
def test_what_is_malformed_is_refused_by_name(field: str, value: object, said: str) -> None:
    error = refusal("chat", **{field: value})
    assert (error.param, error.code) == (field, "invalid_value")
    assert said in str(error)


def test_sizes_are_bounded_to_the_byte_and_the_limit_is_named() -> None:
    longest = "ü" * (MAX_GRAMMAR_BYTES // 2)
    for field in ("grammar", "regex"):
        assert grammars_of("chat", **{field: longest})
        said = str(refusal("chat", **{field: longest + "x"}))
        assert (str(MAX_GRAMMAR_BYTES) in said, str(MAX_GRAMMAR_BYTES + 1) in said) == (True, True)
    assert str(MAX_GRAMMAR_BYTES) in str(refusal("chat", choice=[longest]))
    assert str(MAX_GRAMMAR_BYTES) in str(refusal("chat", response_format=formatted({"const": longest})))
    assert grammars_of("chat", choice=["a"] * MAX_CHOICE_TEXTS)
    assert str(MAX_CHOICE_TEXTS + 1) in str(refusal("chat", choice=["a"] * (MAX_CHOICE_TEXTS + 1)))


def test_the_depth_of_a_schema_is_bounded() -> None:
    def deep(levels: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for place in range(levels - 1):
            schema = {"items": schema} if place % 2 else {"anyOf": schema}
        return schema

    assert grammars_of("chat", response_format=formatted(deep(MAX_SCHEMA_DEPTH)))
    assert str(MAX_SCHEMA_DEPTH) in str(refusal("chat", response_format=formatted(deep(MAX_SCHEMA_DEPTH + 1))))
    refusal("chat", response_format=formatted(deep(900)))


def test_one_grammar_at_a_time() -> None:
    error = refusal("chat", regex="a", choice=["a"])
    assert (error.param, "regex" in str(error)) == ("choice", True)
    assert refusal("chat", response_format={"type": "json_object"}, grammar="start: /a/").param == "grammar"
    assert grammars_of("chat", response_format={"type": "text"}, regex="a") == [Grammar("regex", "a", "regex")]


VLLM: list[tuple[str, Any, str, str]] = [
    ("guided_json", SCHEMA, "json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
    ("guided_json", json.dumps(SCHEMA), "json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
    ("guided_regex", "a+", "regex", "a+"),
    ("guided_choice", ["a", "b"], "choice", '["a", "b"]'),
    ("guided_grammar", 'start: "a"', "lark", 'start: "a"'),
    ("structured_outputs", {"json": SCHEMA, "regex": None}, "json_schema", json.dumps(SCHEMA, ensure_ascii=False)),
    ("structured_outputs", {"json_object": True}, "json_schema", '{"type": "object"}'),
    ("structured_outputs", {"regex": "a+", "disable_any_whitespace": True, "json_object": False}, "regex", "a+"),
    ("structured_outputs", {"choice": ["a"]}, "choice", '["a"]'),
    ("structured_outputs", {"grammar": 'start: "a"'}, "lark", 'start: "a"'),
]


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize(("field", "value", "becomes", "source"), VLLM)
def test_what_vllms_clients_send_is_taken_as_our_own(
    kind: Endpoint, field: str, value: Any, becomes: Any, source: str
) -> None:
    assert grammars_of(kind, **{field: value}) == [Grammar(becomes, source, field)]
    assert refusal(kind, **{field: value}, regex="x").param == field


def test_a_form_of_vllms_that_asks_for_nothing_is_none() -> None:
    assert grammars_of("chat", structured_outputs={}, guided_json=None, guided_decoding_backend="xgrammar") == [None]
    assert grammars_of("chat", structured_outputs={"json": None, "json_object": False}) == [None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_json", "{"),
        ("guided_json", 7),
        ("guided_json", "[" * 100_000),
        ("guided_regex", ""),
        ("guided_choice", []),
        ("guided_grammar", 7),
        ("structured_outputs", "a"),
        ("structured_outputs", {"json": {}, "regex": "a"}),
        ("structured_outputs", {"structural_tag": "x"}),
        ("structured_outputs", {"whitespace_pattern": " "}),
        ("structured_outputs", {"json_object": 1}),
        ("structured_outputs", {"choice": [[]]}),
    ],
)
def test_a_malformed_form_of_vllms_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal("chat", **{field: value})
    assert (error.param, error.code) == (field, "invalid_value")
