"""What clients do in their own ways: base URLs, keys, methods, packed bodies and byte order marks."""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from runtime.config import RuntimeConfig
from runtime.server.http import NearPaths
from tests.support.runtime.serving import Running, serving

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
RAW = json.dumps(BODY).encode()
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(config=RuntimeConfig(slots=4, max_body_bytes=20_000)) as running:
        yield running


def code_of(response: httpx.Response) -> tuple[int, str | None]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


@pytest.mark.parametrize("base", ["", "/", "//", "/v1", "/v1/", "//v1//", "/v1/v1", "/v1/v1/v1/"])
def test_the_official_client_is_answered_whatever_the_base_url(toy: Running, base: str) -> None:
    with openai.OpenAI(base_url=toy.url + base, api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="toy", messages=BODY["messages"]).choices[0].message.content
        assert client.completions.create(model="toy", prompt="a", max_tokens=2).choices[0].text
        assert client.embeddings.create(model="toy", input="a").data[0].embedding
        assert client.responses.create(model="toy", input="a").output_text
        assert [model.id for model in client.models.list()] == ["toy"]
        assert client.models.retrieve("toy").id == "toy"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/models/a/b", "/v1/models/a/b"),
        ("/v1/models/a:b/", "/v1/models/a:b"),
        ("/v1/health", "/health"),
        ("/health/live/", "/health/live"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1", "/"),
        ("//", "/"),
        ("/v1/nothing", "/v1/nothing"),
        ("/v2/models", "/v2/models"),
        ("/nothing//", "/nothing//"),
    ],
)
def test_the_path_that_was_meant(path: str, meant: str) -> None:
    async def app(*_: object) -> None:
        raise AssertionError("only `meant` is asked")

    assert NearPaths(app, ["/", "/v1/models", "/health", "/health/live", "/tokenize"]).meant(path) == meant


@pytest.mark.parametrize("path", ["/api/chat", "/v1/messages", "/completion", f"{CHAT}/chat/completions"])
def test_a_path_that_is_none_is_told_the_base_url(toy: Running, path: str) -> None:
    response = toy.http.post(path, json=BODY)
    assert code_of(response) == (404, "not_found")
    assert f"{toy.url}/v1 as base URL" in response.json()["error"]["message"]


def test_a_nearly_right_path_is_counted_as_its_route(toy: Running) -> None:
    assert toy.http.post("/chat/completions/", json=BODY).status_code == 200
    assert f'route="{CHAT}",status="200"' in toy.http.get("/metrics").text


@pytest.mark.parametrize("path", ["/health", "/health/live", "/v1/models", "/v1/models/toy", "/metrics", "/docs"])
def test_head_is_get_without_the_body(toy: Running, path: str) -> None:
    shown, head = toy.http.get(path), toy.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == shown.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_methods_that_are_not_allowed_are_told_those_that_are(toy: Running) -> None:
    assert code_of(toy.http.put("/health")) == (405, "method_not_allowed")
    assert toy.http.put("/health").headers["allow"] == "GET, HEAD"
    head = toy.http.head(CHAT)
    assert (head.status_code, head.headers["allow"], head.content) == (405, "POST", b"")
    assert toy.http.head("/nothing").status_code == 404


def test_a_key_may_come_as_other_apis_take_theirs() -> None:
    with serving(config=RuntimeConfig(slots=2, api_key="sesame")) as running:
        for name in ("x-api-key", "X-API-Key", "api-key"):
            assert running.http.get("/v1/models", headers={name: "sesame"}).status_code == 200
            assert code_of(running.http.get("/v1/models", headers={name: "wrong"})) == (401, "invalid_api_key")
        both = {"authorization": "Bearer none", "x-api-key": "sesame"}
        assert running.http.post(CHAT, json=BODY, headers=both).status_code == 200


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_a_byte_order_mark_is_passed_over(toy: Running, path: str) -> None:
    body = RAW if path == CHAT else b'{"content": "hi"}'
    assert toy.http.post(path, content=BOM + body).status_code == 200
    assert code_of(toy.http.post(path, content=BOM + BOM + body))[0] == 400


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        *((name, gzip.compress(RAW, mtime=0)) for name in ("gzip", "GZIP", "x-gzip")),
        ("deflate", zlib.compress(RAW)),
        ("identity", RAW),
    ],
)
def test_packed_bodies_are_read(toy: Running, encoding: str, packed: bytes) -> None:
    answer = toy.http.post(CHAT, content=packed, headers={"content-encoding": encoding})
    assert answer.json()["choices"][0]["message"]["content"] == "hel"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "nonsense"])
def test_other_packings_are_a_415_that_names_those_that_are_read(toy: Running, encoding: str) -> None:
    response = toy.http.post(CHAT, content=RAW, headers={"content-encoding": encoding})
    assert code_of(response) == (415, "unsupported_media_type")
    assert "gzip" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "packed",
    [
        RAW,
        gzip.compress(RAW, mtime=0)[:-9],
        gzip.compress(RAW, mtime=0) + b"x",
        b"",
        gzip.compress(RAW, mtime=0)[:8] + b"\xff" * 40,
    ],
    ids=["plain", "cut", "longer", "empty", "broken"],
)
def test_a_broken_packing_is_a_400(toy: Running, packed: bytes) -> None:
    assert code_of(toy.http.post(CHAT, content=packed, headers={"content-encoding": "gzip"}))[0] == 400


@pytest.mark.parametrize("size", [20_001, 10_000_000])
def test_a_body_that_unpacks_beyond_the_limit_is_a_413(toy: Running, size: int) -> None:
    packed = gzip.compress(b" " * size, 9, mtime=0)
    assert len(packed) < 20_000
    response = toy.http.post(CHAT, content=packed, headers={"content-encoding": "gzip"})
    assert code_of(response) == (413, "body_too_large")
    assert "unpacked" in response.json()["error"]["message"]
