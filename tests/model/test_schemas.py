"""Ordinary JSON schemas on the default model, which was trained to answer one word: exactly the asked fields come."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.serving.chat import prepare_chat
from runtime.serving.model import ServedModel, load_model

pytestmark = pytest.mark.model


def object_of(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
SCHEMAS = {
    "person": object_of(name=STRING, age=INTEGER, price=NUMBER),
    "ticket": object_of(title=STRING, priority={"enum": ["low", "high"]}, open={"type": "boolean"}),
    "address": object_of(street=STRING, zip=INTEGER, city=STRING),
    "nested": object_of(user=object_of(name=STRING, id=INTEGER), total=NUMBER),
    # Of four: a model that was never trained to write lists may go on until max_tokens.
    "list": object_of(items={"type": "array", "items": object_of(name=STRING, count=INTEGER), "maxItems": 4}),
    "optional": object_of(subject=STRING, score={"anyOf": [NUMBER, {"type": "null"}]}),
    "ref": {"$defs": {"Date": object_of(year=INTEGER)}, **object_of(event=STRING, date={"$ref": "#/$defs/Date"})},
}
TEXTS = [
    "Anna is 31 years old and sells apples for 2.50 euro a box.",
    "The printer on floor 3 is broken, please fix it today.",
    "Send it to Long Street 5, 10115 Berlin.",
    "User Bob, number 42, paid 12.5 euro.",
    "Two apples and three pears.",
    "Great product, nine out of ten.",
    "The meeting is in May 2024.",
    "Cheap loans, click here now.",
]


@pytest.fixture(scope="module")
def served(email_triage: StoredModel) -> Iterator[ServedModel]:
    model = load_model(email_triage, RuntimeConfig(slots=8, context=4096, threads=2))
    yield model
    model.supervisor.stop()


async def filled(served: ServedModel, schema: dict[str, Any], text: str) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    messages = [{"role": "user", "content": f"Extract as JSON: {text}"}]
    body = {"messages": messages, "response_format": form, "max_tokens": 200, "temperature": 0}
    call = prepare_chat(body, served)
    answer: Any = await call.fold(served.supervisor.submit(*call.work))
    return str(answer["choices"][0]["message"]["content"])


def has_the_fields(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """True if every object in `value` has the properties of its schema and no others."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        own = schema["properties"]
        same = isinstance(value, dict) and value.keys() == own.keys()
        return same and all(has_the_fields(own[name], value[name], root) for name in own)
    if "items" in schema:
        return isinstance(value, list) and all(has_the_fields(schema["items"], item, root) for item in value)
    return True


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_has_exactly_the_asked_fields(name: str, served: ServedModel) -> None:
    async def all_texts() -> list[str]:
        return await asyncio.gather(*(filled(served, SCHEMAS[name], text) for text in TEXTS))

    answers = asyncio.run(all_texts())
    assert [has_the_fields(SCHEMAS[name], json.loads(answer), SCHEMAS[name]) for answer in answers] == [True] * 8
