"""/openapi.json is true: real bodies and answers, errors and chunks too, are what it says. /docs fetches nothing."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from runtime.config import RuntimeConfig
from runtime.errors import DecodeFailed, InvalidRequest
from runtime.openai.chat import parse
from runtime.openai.decisions import parse_decision
from runtime.openai.embeddings import parse_embedding
from runtime.openai.responses.request import parse_response
from runtime.serving.routes import ROUTES
from tests.support.runtime import tool_templates as templates
from tests.support.runtime.fakes import FAKE_WIDTH, FakeLlama
from tests.support.runtime.serving import Running, serving

CHAT, COMPLETION, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
DECISION, EMBEDDING = "/v1/decisions", "/v1/embeddings"
USER = {"role": "user", "content": "hi"}
QUESTIONS = [
    {"type": "predicate", "instructions": "Is it spam?", "name": None},
    {"type": "choice", "name": "c", "instructions": "Which?", "choices": [{"value": "a"}, {"value": True}]},
    {"type": "score", "instructions": "How?", "levels": [{"label": "low"}, {"label": "high", "description": "!"}]},
]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "g"}},
]
RESPONSE_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]
TURNS: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
    USER | {"name": None, "annotations": []},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]},
    {"role": "tool", "tool_call_id": "1", "content": "8 C", "name": "f"},
]  # fmt: skip
ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "8 C"},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TEXT_FORMAT = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
# path -> bodies that are accepted
ACCEPTED: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"messages": [USER], "max_tokens": 3},
        {"messages": [USER], "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 2, "user": 7, "model": None},
        {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True},
        {"messages": [USER], "stream": True, "stream_options": {"continuous_usage_stats": True}, "max_tokens": 2},
        {"messages": [USER], "stop": ["a"], "logit_bias": {"65": -3.5}, "seed": -3, "audio": None, "max_tokens": 2},
        {"messages": [USER], "response_format": FORMAT, "max_tokens": 4},
        {"messages": [USER], "choice": ["a", "b"]},
        {"messages": [USER], "structured_outputs": {"choice": ["a"]}, "guided_decoding_backend": "xgrammar"},
        {"messages": [USER], "guided_json": {"enum": ["a", "b"]}},
        {"messages": [USER], "tools": TOOLS, "temperature": 0},
        {"messages": TURNS, "tools": TOOLS, "temperature": 0, "stream": True, "tool_choice": "auto"},
    ],
    COMPLETION: [
        {"prompt": "a", "max_tokens": 3},
        {"prompt": [[65, 66], [67]], "logprobs": 2, "n": 2, "echo": False, "max_tokens": 2},
        {"prompt": [65], "stream": True, "stream_options": {"include_usage": True}, "logprobs": 0},
        {"prompt": ["a", "b"], "regex": "[ab]", "stop": "x"},
        {"prompt": "a", "guided_regex": "[ab]"},
        {"prompt": ["ab", "c"], "echo": True, "logprobs": 1, "max_tokens": 0},
        {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 2, "stream": True},
    ],
    RESPONSE: [
        {"input": "hi", "max_output_tokens": 2},
        {
            "input": ITEMS,
            "tools": RESPONSE_TOOLS,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
            "metadata": {"a": "b"},
        },
        {"input": "hi", "stream": True, "include": ["message.output_text.logprobs"], "reasoning": {}},
        {"input": "hi", "text": TEXT_FORMAT, "instructions": "be brief", "max_output_tokens": 4},
        {"input": "hi", "tools": RESPONSE_TOOLS, "temperature": 0, "tool_choice": "auto"},
        {"input": "hi", "tools": RESPONSE_TOOLS, "temperature": 0, "stream": True},
    ],
    DECISION: [
        {"input": "a mail", "questions": QUESTIONS},
        {"input": [{"role": "user", "content": [{"type": "input_json", "data": {}}]}], "questions": QUESTIONS[:1]},
    ],
    EMBEDDING: [{"input": "a"}, {"input": ["a", "b"], "encoding_format": "base64", "dimensions": FAKE_WIDTH}],
    "/tokenize": [{"content": "hi"}, {"content": "😀", "with_pieces": True, "model": "toy"}],
    "/detokenize": [{"tokens": [104, 105]}],
    "/apply-template": [{"messages": TURNS[:2]}],
}
# path, body, status
REFUSED: list[tuple[str, Any, int]] = [
    *((path, {"colour": "red"}, 400) for path in ACCEPTED),
    *((path, body[0] | {"model": "another"}, 404) for path, body in ACCEPTED.items()),
    *((path, "x" * (9 << 20), 413) for path in ACCEPTED),
    (CHAT, {"messages": [USER], "n": 100}, 400),
    (COMPLETION, {"prompt": "x" * 5000}, 400),
]


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=2048, script="hello")) as running:
        yield running


@pytest.fixture(scope="module")
def caller() -> Iterator[Running]:
    """A server whose model calls tools."""
    script = "Wait.\n" + templates.TWO_CALLS[templates.HERMES]
    with serving(FakeLlama(n_ctx=4096, script=script, template=templates.HERMES)) as running:
        yield running


@pytest.fixture(scope="module")
def document(toy: Running) -> Any:
    return toy.http.get("/openapi.json").raise_for_status().json()


def fault(document: Any, schema: Any, value: object) -> str | None:
    """The first error of `value` by a schema of the document; None if it is valid."""
    errors = Draft202012Validator(schema | {"components": document["components"]}).iter_errors(value)
    return next((f"{list(error.absolute_path)}: {error.message:.300}" for error in errors), None)


def check(document: Any, path: str, response: httpx.Response, method: str = "post") -> None:
    """Require that the response has a documented status, and every part of it the documented form."""
    documented = document["paths"][path][method]["responses"]
    assert str(response.status_code) in documented, (path, response.status_code)
    kind = response.headers["content-type"].partition(";")[0]
    schema = documented[str(response.status_code)]["content"][kind]["schema"]
    if kind == "text/plain":
        return
    if kind == "application/json":
        assert fault(document, schema, response.json()) is None
        return
    data = [block.rpartition("data: ")[2] for block in response.text.strip().split("\n\n")]
    for text in data:
        assert fault(document, schema, text if text == "[DONE]" else json.loads(text)) is None


def test_the_document_is_valid(document: Any) -> None:
    validate(document)


def test_every_route_is_in_the_document_with_its_errors(toy: Running, document: Any) -> None:
    routes = [route for route in toy.server.config.app.routes if isinstance(route, APIRoute)]  # type: ignore[union-attr]
    described = [route for route in routes if route.include_in_schema]
    shown = {(route.path_format, method.lower()) for route in described for method in route.methods or ()}
    assert shown == {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {route.path for route in routes if not route.include_in_schema} == {"/openapi.json", "/docs"}
    for path, method in shown:
        statuses = set(document["paths"][path][method]["responses"])
        expected = {"400", "404", "408", "413", "429", "500", "503"} if method == "post" else {"500"}
        assert expected <= statuses, path
        assert "422" not in statuses
    assert set(ACCEPTED) == {path for path, method in shown if method == "post"}


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, bodies in ACCEPTED.items() for body in bodies])
def test_what_is_accepted_and_answered_is_documented(
    path: str, body: Any, toy: Running, caller: Running, document: Any
) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    assert fault(document, content["application/json"]["schema"], body) is None
    response = (caller if "tools" in body else toy).http.post(path, json=body)
    assert response.status_code == 200, response.text
    check(document, path, response)


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/v1/models/{name}", "/health", "/health/ready", "/health/live", "/metrics"]
)
def test_what_is_shown_is_documented(path: str, toy: Running, document: Any) -> None:
    check(document, path, toy.http.get(path.replace("{name}", "toy")), "get")


def test_an_unknown_model_is_documented(toy: Running, document: Any) -> None:
    response = toy.http.get("/v1/models/another")
    assert response.status_code == 404
    check(document, "/v1/models/{name}", response, "get")


@pytest.mark.parametrize(("path", "body", "status"), REFUSED, ids=lambda value: str(value)[:30])
def test_refusals_are_documented(path: str, body: Any, status: int, toy: Running, document: Any) -> None:
    response = toy.http.post(path, json=body)
    assert response.status_code == status
    check(document, path, response)


@pytest.mark.parametrize("path", [CHAT, RESPONSE])
@pytest.mark.parametrize("stream", [False, True])
def test_faults_are_documented(path: str, stream: bool, document: Any) -> None:
    """A whole answer ends in a 500; a stream in an event."""
    with serving(FakeLlama(fail_at={1: DecodeFailed("broken")}, script="hello")) as broken:
        response = broken.http.post(path, json=ACCEPTED[path][0] | {"stream": stream})
        assert response.status_code == (200 if stream else 500)
        assert "broken" in response.text
        check(document, path, response)


def test_a_key_is_documented_where_one_is_asked_for() -> None:
    with serving(FakeLlama(), RuntimeConfig(api_key="k")) as keyed:
        document = keyed.http.get("/openapi.json").json()
        validate(document)
        assert document["components"]["securitySchemes"]
        for path, methods in document["paths"].items():
            for operation in methods.values():
                needs_key = path != "/" and not path.startswith("/health")
                assert ("401" in operation["responses"]) == ("security" in operation) == needs_key
        for path, bodies in ACCEPTED.items():
            response = keyed.http.post(path, json=bodies[0])
            assert response.status_code == 401
            check(document, path, response)


def random_json(draw: random.Random, depth: int = 2) -> Any:
    """Any JSON value, of at most so many levels."""
    scalars: list[Any] = [None, True, False, 0, -1, 7, 2**40, 0.5, -3.25, 1e30, "", "a", "auto", "é\n", "x" * 8]
    kind = draw.randrange(4) if depth else 0
    if kind == 1:
        return [random_json(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 2:
        names = ["type", "role", "content", "", "x"]
        return {draw.choice(names): random_json(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.choice(scalars)


def read(path: str, body: object) -> None:
    """Judge a body without a model."""
    if path == CHAT:
        parse("chat", body)
    elif path == COMPLETION:
        parse("completion", body)
    elif path == RESPONSE:
        parse("chat", dict(parse_response(body).chat))
    elif path == DECISION:
        parse_decision(body)
    else:
        parse_embedding(body, FAKE_WIDTH)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("path", sorted(ROUTES))
def test_no_body_is_accepted_that_the_document_refuses(document: Any, path: str, seed: int) -> None:
    draw = random.Random(f"{path} {seed}")
    fields = sorted(document["components"]["schemas"][ROUTES[path].body.__name__]["properties"])
    known = [{name: value} for body in ACCEPTED[path] for name, value in body.items()]
    changes = {draw.choice(fields): random_json(draw) for _ in range(draw.randrange(3))}
    body = ACCEPTED[path][0] | draw.choice(known) | changes
    try:
        read(path, body)
    except InvalidRequest:
        return
    schema = {"$ref": f"#/components/schemas/{ROUTES[path].body.__name__}"}
    assert fault(document, schema, body) is None, body


def test_the_page_fetches_nothing_from_elsewhere(toy: Running) -> None:
    page = toy.http.get("/docs").raise_for_status()
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in re.sub(r"(?m)^\s*//.*$", "", page.text).replace("<!--", "")
    for link in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert toy.http.get(f"/{link}").raise_for_status().content
    assert toy.http.get("/docs/assets/none.js").json()["error"]["code"] == "not_found"
