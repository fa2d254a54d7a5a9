"""The body fields that constrain an answer: `response_format`, `grammar`, `regex` and `choice`, and vLLM's names. Pure.

Sizes and depths are bounded here, before llguidance compiles anything.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from runtime.requests import Grammar

MAX_GRAMMAR_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 64
MAX_CHOICE_TEXTS = 1024
_FORMATS = {
    "text": {"type"},
    "json_object": {"type", "schema"},
    "json_schema": {"type", "json_schema"},
}
# How vLLM is to enforce a form; here there is no free white space, and no key beyond a schema's.
_VLLM_SETTINGS = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties")
_SCHEMA_FIELDS = {"name", "description", "schema", "strict"}


class FormatSchema(TypedDict):
    """A named JSON schema."""

    name: NotRequired[Any]
    description: NotRequired[Any]
    schema: dict[str, Any]
    strict: NotRequired[Any]


class StructuredOutputs(TypedDict):
    """One form of an answer, as vLLM's clients send it."""

    json: NotRequired[dict[str, Any] | str]
    json_object: NotRequired[bool]
    regex: NotRequired[str]
    choice: NotRequired[list[str]]
    grammar: NotRequired[str]


class TextFormat(TypedDict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(TypedDict):
    """A JSON object: any, or one that the schema describes."""

    type: Literal["json_object"]
    schema: NotRequired[dict[str, Any] | None]


class SchemaFormat(TypedDict):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: FormatSchema


def format_grammar(value: object) -> Grammar | None:
    """Read OpenAI's `response_format`; None for plain text. `strict` refuses a schema that cannot be enforced whole."""
    fields = _object(value, "an object with a type")
    kind = fields.get("type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise ValueError(f"takes the types {', '.join(_FORMATS)}")
    _no_others(fields, _FORMATS[kind])
    if kind == "text":
        return None
    schema: object = {"type": "object"} if fields.get("schema") is None else _object(fields["schema"], "a JSON schema")
    strict = False
    if kind == "json_schema":
        described = _object(fields.get("json_schema"), "json_schema with a schema")
        _no_others(described, _SCHEMA_FIELDS)
        schema = _object(described.get("schema"), "json_schema.schema, a JSON schema")
        strict = described.get("strict") is True
    bound_depth(schema)
    return _bounded(Grammar("json_schema", json.dumps(schema, ensure_ascii=False), "response_format", strict))


def lark_grammar(value: object, param: str = "grammar") -> Grammar:
    """Read `grammar`: a grammar in llguidance's dialect of Lark, or in GBNF."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be the text of a Lark grammar, which defines the rule start")
    return _bounded(Grammar("lark", value, param))


def regex_grammar(value: object, param: str = "regex") -> Grammar:
    """Read `regex`: a regular expression that the whole answer matches."""
    if not isinstance(value, str) or not value:
        raise ValueError("must be a regular expression")
    return _bounded(Grammar("regex", value, param))


def choice_grammar(value: object, param: str = "choice") -> Grammar:
    """Read `choice`: the texts of which the answer is one."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError("must be a non-empty list of non-empty strings")
    if len(value) > MAX_CHOICE_TEXTS:
        raise ValueError(f"takes at most {MAX_CHOICE_TEXTS} strings, got {len(value)}")
    return _bounded(Grammar("choice", json.dumps(value, ensure_ascii=False), param))


def schema_grammar(value: object, param: str = "guided_json") -> Grammar:
    """Read vLLM's `guided_json`: a JSON schema, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("must hold a JSON schema") from None
    schema = _object(value, "a JSON schema")
    bound_depth(schema)
    return _bounded(Grammar("json_schema", json.dumps(schema, ensure_ascii=False), param))


def structured_grammar(value: object) -> Grammar | None:
    """Read vLLM's `structured_outputs`: an object with one of json, json_object, regex, choice and grammar."""
    fields = _object(value, "an object")
    given = {name: item for name, item in fields.items() if item is not None and name not in _VLLM_SETTINGS}
    if given.get("json_object") is False:
        del given["json_object"]
    if not given:
        return None
    name, form = next(iter(given.items()))
    if len(given) > 1 or name not in _STRUCTURED:
        raise ValueError(f"takes one of {', '.join(_STRUCTURED)}, got {', '.join(map(reprlib.repr, given))}")
    return _STRUCTURED[name](form, "structured_outputs")


def _any_object(value: object, param: str) -> Grammar:
    if value is not True:
        raise ValueError("takes true or false as json_object")
    return Grammar("json_schema", '{"type": "object"}', param)


_STRUCTURED: Mapping[str, Callable[[object, str], Grammar]] = {
    "json": schema_grammar,
    "json_object": _any_object,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"must hold {what}")
    return value


def _no_others(fields: Mapping[str, Any], known: set[str]) -> None:
    for name, value in fields.items():
        if name not in known and value is not None:
            raise ValueError(f"has an unknown field {reprlib.repr(name)}")


def _bounded(grammar: Grammar) -> Grammar:
    n_bytes = len(grammar.source.encode())
    if n_bytes > MAX_GRAMMAR_BYTES:
        raise ValueError(f"takes at most {MAX_GRAMMAR_BYTES} bytes, got {n_bytes}")
    return grammar


def bound_depth(schema: object) -> None:
    """Raise ValueError if `schema` is nested too deeply. Walks it level by level, without recursion."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"holds a schema nested deeper than {MAX_SCHEMA_DEPTH} levels, the limit")
        parents = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [child for children in parents for child in children]
