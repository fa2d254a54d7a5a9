"""The table of fields is whole and true: every field and value that the installed client publishes has its decision."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.decision_create_params import DecisionCreateParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from typing_extensions import is_typeddict

from runtime.errors import InvalidRequest
from runtime.openai import fields
from runtime.openai.fields import TABLES, FieldRule, Table
from tests.support.runtime.bodies import BODIES, places, with_value

PUBLISHED: dict[str, Any] = {
    "/v1/chat/completions": ChatParams,
    "/v1/completions": CompletionParams,
    "/v1/responses": ResponseCreateParamsBase,
    "/v1/decisions": DecisionCreateParams,
    "/v1/embeddings": EmbeddingCreateParams,
}
SAMPLES = {
    "/v1/chat/completions": ("chat", "chat with a format"),
    "/v1/completions": ("completion",),
    "/v1/responses": ("response", "response with tools"),
    "/v1/decisions": ("decision",),
    "/v1/embeddings": ("embedding",),
}
NESTED = [(route, rule) for route, table in TABLES.items() for rule in table.values() if "." in rule.path]
# Their content is the user's, in which null means null.
FREE = {"schema", "parameters", "data", "metadata", "logit_bias"}
ANYTHING: tuple[Any, ...] = ("x", 17, {"a": 1}, [{}])


class Published(NamedTuple):
    """A field of the client's types: its path, its named values, and the objects it may hold with their paths."""

    path: str
    values: list[str]
    objects: list[tuple[str, Any]]


def parts(kind: Any) -> list[Any]:
    """The types that a type is made of, without its wrappers; itself if it is made of none."""
    origin = get_origin(kind)
    if origin in (Required, NotRequired) or (origin is not None and origin not in (Union, Literal) and is_alias(kind)):
        return [part for argument in get_args(kind) for part in parts(argument)]
    if origin is Union:
        return [part for argument in get_args(kind) for part in parts(argument)]
    return [kind]


def is_alias(kind: Any) -> bool:
    return get_origin(kind) not in (dict, list) and not hasattr(get_origin(kind), "__iter__")


def published(kind: Any, path: str) -> Iterator[Published]:
    """The fields of one of the client's objects, which stands at `path`."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        place = f"{path}.{name}" if path else name
        values, objects = list[str](), list[tuple[str, Any]]()
        found = parts(hint)
        for part in found:
            many = get_origin(part) is not None and get_origin(part) not in (Literal, dict)
            for inner in [inner for argument in get_args(part) for inner in parts(argument)] if many else [part]:
                if is_typeddict(inner):
                    objects.append((f"{place}[]" if many else place, inner))
                elif get_origin(inner) is Literal and str not in found:
                    values += [value for value in get_args(inner) if isinstance(value, str)]
        yield Published(place, values, objects)


def undecided(kind: Any, path: str, table: Table) -> Iterator[str]:
    """The fields and values of the client's object without a decision; alternatives that are not used are left out."""
    found = list(published(kind, path))
    for field in found:
        rule = table.get(field.path)
        if rule is not None and field.values and set(field.values) <= {*rule.refuses, *rule.ignores}:
            return
    for field in found:
        rule = table.get(field.path)
        if rule is None:
            yield field.path
            continue
        known = (*rule.accepts, *rule.ignores, *rule.refuses)
        if rule.treatment != "ignored":
            yield from (f"{field.path} = {v!r}" for v in field.values if v not in known and [v] not in known)
        if rule.treatment == "used":
            for place, inner in field.objects:
                yield from undecided(inner, place, table)


@pytest.mark.parametrize("route", PUBLISHED)
def test_every_field_and_value_that_the_client_publishes_is_decided(route: str) -> None:
    assert sorted(set(undecided(PUBLISHED[route], "", TABLES[route]))) == []


def paths(kind: Any, path: str, table: Table) -> Iterator[str]:
    for field in published(kind, path):
        yield field.path
        if field.path in table and table[field.path].treatment == "used":
            for place, inner in field.objects:
                yield from paths(inner, place, table)


@pytest.mark.parametrize("route", PUBLISHED)
def test_what_the_client_does_not_publish_is_marked_as_ours(route: str) -> None:
    known = {*paths(PUBLISHED[route], "", TABLES[route]), "stream"}
    assert {path for path, rule in TABLES[route].items() if not rule.ours} <= known
    assert not {path for path, rule in TABLES[route].items() if rule.ours} & known


def test_the_walk_sees_what_it_should() -> None:
    """A walk that finds nothing is content with any table."""
    without = {path: rule for path, rule in TABLES["/v1/chat/completions"].items() if "tool_calls[]." not in path}
    missed = set(undecided(ChatParams, "", without))
    assert {"messages[].tool_calls[].id", "messages[].tool_calls[].function"} <= missed
    silent = {path: FieldRule(path, rule.treatment) for path, rule in TABLES["/v1/chat/completions"].items()}
    assert {"verbosity = 'low'", "messages[].role = 'function'"} <= set(undecided(ChatParams, "", silent))


def test_the_page_is_of_this_table() -> None:
    page = Path(fields.__file__).with_name("FIELDS.md").read_text(encoding="utf-8")
    assert page == fields.fields_page(), "write it: python -m runtime.openai.fields > runtime/openai/FIELDS.md"


def objects_at(body: Any, path: str) -> list[dict[str, Any]]:
    """The objects of a body at a path such as `messages[].content[]`."""
    found = [body]
    for name in filter(None, path.split(".")):
        key = name.removesuffix("[]")
        found = [item[key] for item in found if isinstance(item, dict) and key in item]
        if name.endswith("[]"):
            found = [item for items in found if isinstance(items, list) for item in items]
    return [item for item in found if isinstance(item, dict)]


def changed(route: str, rule: FieldRule, value: Any) -> list[tuple[str, Any]]:
    """The sample bodies, each by its name, in which the field can stand: with `value` in every place for it."""
    bodies = []
    for sample in SAMPLES[route]:
        body = deepcopy(BODIES[sample][0])
        objects = objects_at(body, rule.path.rpartition(".")[0])
        for item in objects:
            item[rule.name] = value
        if objects:
            bodies.append((sample, body))
    assert bodies, f"no sample has a place for {rule.path}"
    return bodies


@pytest.mark.parametrize(
    ("route", "rule"), [row for row in NESTED if row[1].treatment != "used"], ids=lambda part: getattr(part, "path", "")
)
def test_each_nested_field_is_treated_as_the_table_says(route: str, rule: FieldRule) -> None:
    for value in ANYTHING if rule.treatment == "ignored" else rule.accepts:
        for sample, body in changed(route, rule, value):
            original, read = BODIES[sample]
            assert read(body) == read(original)
    for value in ANYTHING if rule.treatment == "refused" else ():
        for sample, body in changed(route, rule, value):
            with pytest.raises(InvalidRequest) as caught:
                BODIES[sample][1](body)
            assert (caught.value.param or "").endswith(rule.name)


@pytest.mark.parametrize(
    ("route", "rule"), [row for row in NESTED if row[1].refuses], ids=lambda part: getattr(part, "path", "")
)
def test_each_published_value_that_is_not_used_is_refused(route: str, rule: FieldRule) -> None:
    for value in rule.refuses:
        for sample, body in changed(route, rule, value):
            with pytest.raises(InvalidRequest):
                BODIES[sample][1](body)


@pytest.mark.parametrize("sample", BODIES)
def test_null_counts_as_absent_at_every_depth_in_unknown_fields_too(sample: str) -> None:
    original, read = BODIES[sample]
    plain = read(original)
    n_objects = 0
    for at in places(original):
        inner: Any = original
        for key in at:
            inner = inner[key]
        if isinstance(inner, dict) and not FREE.intersection(at):
            n_objects += 1
            assert read(with_value(original, (*at, "unheard_of"), None)) == plain
    assert n_objects
