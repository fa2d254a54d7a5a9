"""Schemas are closed: own keys at every depth, numbers of bounded length, JSON with the white space models know."""

import json
from typing import Any

import pytest

from runtime.decoding.grammar import Grammars
from runtime.decoding.schema import MAX_COPIES, closed
from runtime.errors import GrammarFailed, InvalidRequest
from runtime.requests import Grammar
from tests.support.runtime.fakes import FakeTokenizer

GRAMMARS = Grammars(FakeTokenizer())
INTEGER: dict[str, Any] = {"type": "integer"}
A: dict[str, Any] = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
B: dict[str, Any] = {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}
KIND: dict[str, Any] = {"type": "object", "properties": {"k": {"enum": ["x", "y"]}}, "required": ["k"]}


def takes(schema: Any, text: str, *, compact: bool = False) -> bool:
    """Whether an answer of exactly `text` may be given."""
    state = GRAMMARS.compile(Grammar("json_schema", closed(json.dumps(schema), compact=compact), "response_format"))
    try:
        state.accept([*text.encode()])
    except GrammarFailed:
        return False
    return state.complete or bool(state.allowed()[list(FakeTokenizer.end_tokens)].any())


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (A, ['{"a": 1}'], ['{"a":1}', '{"a": 1, "z": 1}', '{"z": 1, "a": 1}', "{}"]),
        ({"properties": {"o": A}}, ['{"o": {"a": 1}}', "{}"], ['{"o": {"a": 1, "z": 1}}', '{"z": 1}']),
        ({"type": "array", "items": A}, ['[{"a": 1}, {"a": 2}]'], ['[{"a": 1, "z": 1}]']),
        ({"type": "array", "prefixItems": [A], "maxItems": 1}, ['[{"a": 1}]'], ['[{"a": 1, "z": 1}]']),
        ({"type": "object", "additionalProperties": A}, ['{"q": {"a": 1}}'], ['{"q": {"a": 1, "z": 1}}']),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, ['{"a": 1}'], ['{"a": 1, "z": 1}']),
        ({"$ref": "#/components/A", "components": {"A": A}}, ['{"a": 1}'], ['{"a": 1, "z": 1}']),
        ({"properties": {"o": {"$ref": "#"}}}, ['{"o": {"o": {}}}'], ['{"o": {"z": 1}}']),
        ({"anyOf": [A, {"type": "null"}]}, ['{"a": 1}', "null"], ['{"a": 1, "z": 1}']),
        ({"type": "object", "properties": {}}, ["{}"], ['{"z": 1}']),
        ({"type": "object", "required": ["a"]}, ['{"a": [1]}'], ['{"a": 1, "z": 1}']),
        ({"type": "object", "patternProperties": {"^x": INTEGER}}, ['{"x1": 1}'], ['{"z": 1}']),
        ({**A, "unevaluatedProperties": False}, ['{"a": 1}'], ['{"a": 1, "z": 1}']),
    ],
)
def test_an_object_has_its_own_keys_at_every_depth(schema: Any, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right + wrong if takes(schema, text)] == right


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"allOf": [A, B]}, ['{"a": 1, "b": true}'], ['{"a": 1}', '{"a": 1, "b": 2}', '{"a": 1, "b": true, "z": 1}']),
        ({**A, "allOf": [B]}, ['{"a": 1, "b": true}'], ['{"a": 1}', '{"a": 1, "b": true, "z": 1}']),
        (
            {**B, "$ref": "#/$defs/A", "$defs": {"A": A}},
            ['{"b": true, "a": 1}'],
            ['{"b": true}', '{"b": true, "a": 1, "z": 1}'],
        ),
        (
            {**KIND, "anyOf": [A, B]},
            ['{"k": "x", "a": 1}', '{"k": "y", "b": true}'],
            ['{"k": "x"}', '{"k": "x", "b": 1}', '{"k": "x", "a": 1, "b": true}', '{"k": "x", "a": 1, "z": 1}'],
        ),
        (
            {**KIND, "if": {"properties": {"k": {"const": "x"}}}, "then": A},
            ['{"k": "x", "a": 1}', '{"k": "x"}'],
            ['{"k": "x", "a": "1"}', '{"k": "x", "z": 1}'],
        ),
        (
            {**KIND, "allOf": [{"if": KIND, "then": A}]},
            ['{"k": "x", "a": 1}', '{"k": "x"}'],
            ['{"k": "x", "a": "1"}', '{"k": "x", "z": 1}'],
        ),
        (
            {"properties": {"a": INTEGER, "b": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            ['{"a": 1}', '{"b": 1}', '{"a": 1, "b": 1}'],
            ["{}", '{"a": 1, "z": 1}'],
        ),
    ],
)
def test_parts_of_one_object_share_their_keys(schema: Any, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right + wrong if takes(schema, text)] == right


@pytest.mark.parametrize("schema", [{}, True, {"type": "object"}, {"description": "anything"}, {"title": "t"}])
def test_a_schema_that_names_nothing_stays_open(schema: Any) -> None:
    assert takes(schema, '{"x": {"y": [1, "z", null, 2.5, true]}}')
    assert not takes(schema, '{"x": {"y": [1000000000000000000]}}')


def test_keys_that_are_asked_for_are_not_forbidden() -> None:
    assert takes({**A, "additionalProperties": True}, '{"a": 1, "z": {"y": 1}}')
    assert takes({**A, "additionalProperties": {"type": "string"}}, '{"a": 1, "z": "y"}')
    assert takes({"allOf": [{**A, "additionalProperties": True}, B]}, '{"a": 1, "b": true, "z": 1}')
    assert takes({"properties": {"o": {"type": "object"}}}, '{"o": {"free": 1}}')


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (INTEGER, ["0", "-7", "9" * 16], ["9" * 17, "-" + "9" * 17, "1e5"]),
        ({"type": "integer", "minimum": 0}, ["0", "9" * 16], ["-1", "9" * 17]),
        ({"type": "integer", "minimum": 10**17}, ["1" + "0" * 17], ["1" + "0" * 16, "1" * 30]),
        ({"type": ["integer", "null"]}, ["5", "null"], ["9" * 17]),
        ({"type": "number"}, ["2", "-2.50", "0." + "3" * 9], ["0." + "3" * 10, "9" * 17, "0.5" + "0" * 30]),
        ({"type": "number", "minimum": 0, "maximum": 1}, ["0.25", "1"], ["1.5", "0." + "3" * 30]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.25"], ["0", "9" * 17]),
        ({"type": "array", "items": {"type": "number"}, "maxItems": 1}, ["[1.5]"], ["[" + "9" * 17 + "]"]),
        ({"enum": [10**17]}, ["1" + "0" * 17], ["1"]),
    ],
)
def test_a_number_has_bounded_digits(schema: Any, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right + wrong if takes(schema, text)] == right


def test_a_property_may_have_the_name_of_a_keyword() -> None:
    schema = {"properties": {"properties": {"type": "string"}, "$ref": INTEGER, "required": {"type": "boolean"}}}
    assert takes(schema, '{"properties": "x", "$ref": 1, "required": true}')
    assert not takes(schema, '{"properties": {}}')


def test_values_in_a_schema_are_no_schemas() -> None:
    value = {"properties": {"q": 1}, "type": "integer"}
    assert takes({"const": value}, json.dumps(value))
    assert takes({"enum": [value, {}]}, "{}")
    assert json.loads(closed(json.dumps({"type": "string", "default": value})))["default"] == value


def test_a_model_that_learnt_compact_json_writes_it() -> None:
    schema = {"properties": {"a": INTEGER, "b": {"type": "array", "items": INTEGER}}}
    assert takes(schema, '{"a": 1, "b": [1, 2]}')
    assert takes(schema, '{"a":1,"b":[1,2]}', compact=True)
    assert not takes(schema, '{"a": 1, "b": [1, 2]}', compact=True)


def chained(count: int) -> dict[str, Any]:
    parts = {f"d{i}": {"properties": {f"p{i}": {}}, "allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$defs": {**parts, f"d{count}": A}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize("count", [20, 2 * MAX_COPIES])
def test_references_that_multiply_cost_no_more_than_the_limits(count: int) -> None:
    assert len(closed(json.dumps(chained(count)))) < 50 << 20


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}], "properties": {}},
        {"$ref": "#/$defs/missing", "required": ["a"]},
        {"$ref": 7, "required": "a", "properties": [], "anyOf": {}, "allOf": 1, "items": [1], "type": 3},
        {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"$ref": "#/properties/a"}}},
        {"items": [True, False], "x-guidance": 5},
        False,
    ],
)
def test_what_makes_no_sense_is_left_for_llguidance_to_judge(schema: Any) -> None:
    json.loads(closed(json.dumps(schema)))


@pytest.mark.parametrize("kinds", [[[]], [{}], {"a": 1}, [None], 7])
def test_types_that_are_no_names_are_left_for_llguidance_to_refuse(kinds: Any) -> None:
    with pytest.raises(InvalidRequest):
        takes({"type": kinds}, "1")


@pytest.mark.parametrize("definitions", [None, [[]], 7, "x", True])
def test_definitions_that_are_none_do_not_keep_a_schema_from_having_shared_ones(definitions: Any) -> None:
    assert takes({"properties": {"a": INTEGER}, "$defs": definitions}, '{"a": 1}')
