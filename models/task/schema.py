"""The JSON schema of an extraction's answers: guessed from examples, and checked against them.

Answers are kept in one form, the one that is served under the schema: no white space, keys in the schema's order.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

# A text field with few distinct values is an enumeration if each is seen this often on average.
ENUM_REPEATS = 5
MAX_ENUM = 30
_TYPES = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object"))


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError if `schema` is no JSON schema (draft 2020-12) of an object."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"schema is no JSON schema: {error.message}") from error
    if schema.get("type") != "object":
        raise ValueError(f'schema must describe an object, type = "object"; got {schema.get("type")!r}')


def fault(answer: str, schema: dict[str, Any]) -> str:
    """Say where `answer` leaves the schema; empty if it fits."""
    try:
        value = json.loads(answer)
    except ValueError as error:
        return f"not JSON: {error}"
    found = next(iter(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value)), None)
    if found is None:
        return ""
    where = ".".join(str(part) for part in found.absolute_path)
    return f"{where}: {found.message}" if where else str(found.message)


def canonical(answer: str, schema: dict[str, Any]) -> str:
    """The JSON text `answer` in the form that is served: compact, its keys in the schema's order, unknown ones last."""
    return json.dumps(_ordered(json.loads(answer), schema), ensure_ascii=False, separators=(",", ":"))


def guess_schema(answers: Sequence[str]) -> dict[str, Any]:
    """The narrowest simple schema that fits all `answers`, each a JSON object."""
    return _of([json.loads(answer) for answer in answers])


def _ordered(value: Any, schema: Any) -> Any:
    """`value` with the keys of its objects in the order of the schema's properties."""
    stated = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [_ordered(item, stated.get("items")) for item in value]
    if not isinstance(value, dict):
        return value
    known = stated.get("properties", {})
    return {key: _ordered(value[key], known.get(key)) for key in sorted(value, key=_places(known))}


def _places(known: dict[str, Any]) -> Callable[[str], int]:
    """The place of a key among the known ones; all others are behind them."""
    places = {key: place for place, key in enumerate(known)}
    return lambda key: places.get(key, len(places))


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema))


def _type(value: object) -> str:
    return next((name for kind, name in _TYPES if isinstance(value, kind)), "null")


def _of(values: Sequence[Any]) -> dict[str, Any]:
    types = sorted({_type(value) for value in values})
    if "number" in types and "integer" in types:
        types.remove("integer")
    schema: dict[str, Any] = {"type": types[0] if len(types) == 1 else types}
    if objects := [value for value in values if isinstance(value, dict)]:
        keys = list(dict.fromkeys(key for value in objects for key in value))
        schema["properties"] = {key: _of([value[key] for value in objects if key in value]) for key in keys}
        schema["required"] = [key for key in keys if all(key in value for value in objects)]
        schema["additionalProperties"] = False
    if any(isinstance(value, list) for value in values):
        lists = [value for value in values if isinstance(value, list)]
        items = [item for value in lists for item in value]
        schema["items"] = _of(items) if items else {}
        # A list of choices has an end, or a model that repeats itself never ends its answer.
        if "enum" in schema["items"]:
            schema["maxItems"] = max(map(len, lists))
    if types == ["string"]:
        distinct = sorted(set(values))
        if len(distinct) <= MAX_ENUM and len(values) >= ENUM_REPEATS * len(distinct):
            schema["enum"] = distinct
    return schema
