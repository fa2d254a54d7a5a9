"""What a web page in the user's browser may not do: send bodies without asking, come by a name of its own, or ask."""

import json
from collections.abc import Iterator

import httpx
import pytest
from starlette.datastructures import Headers

from runtime.config import RuntimeConfig
from runtime.errors import Forbidden
from runtime.server.http import Guard, host_name
from tests.support.runtime.serving import Running, serving

CHAT = "/v1/chat/completions"
CHAT_BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
POSTS = [CHAT, "/v1/completions", "/v1/decisions", "/v1/embeddings", "/v1/responses"]
POSTS += ["/tokenize", "/detokenize", "/apply-template"]
GETS = [
    "/v1/models",
    "/v1/models/toy",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/docs",
    "/openapi.json",
]


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving() as running:
        yield running


def code_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def guard(**settings: object) -> Guard:
    async def app(*_: object) -> None:
        raise AssertionError("only `check` is asked")

    return Guard(app, RuntimeConfig(**settings))  # type: ignore[arg-type]


def passes(judge: Guard, host: str, origin: str | None = None) -> bool:
    try:
        judge.check(Headers({"host": host} | ({"origin": origin} if origin is not None else {})))
    except Forbidden:
        return False
    return True


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "text/plain;application/json", "application/x-www-form-urlencoded", "text/json"]
)
def test_a_body_of_a_type_that_a_page_may_send_unasked_is_a_415(toy: Running, path: str, kind: str | None) -> None:
    before = toy.llama.decodes
    headers = {} if kind is None else {"content-type": kind}
    response = httpx.post(toy.url + path, content=CHAT_BODY, headers=headers)
    assert code_of(response) == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in response.json()["error"]["message"]
    assert toy.llama.decodes == before


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_json_by_any_of_its_names_is_read(toy: Running, kind: str) -> None:
    assert httpx.post(toy.url + CHAT, content=CHAT_BODY, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("path", [*POSTS, *GETS, "/", "/nothing"])
def test_a_page_that_came_by_a_name_of_its_own_gets_nothing(toy: Running, path: str) -> None:
    method = "POST" if path in POSTS else "GET"
    for host in ("rebound.example", "rebound.example:8080", "127.0.0.1.rebound.example", "localhost.example"):
        response = toy.http.request(method, path, content=CHAT_BODY, headers={"host": host})
        assert code_of(response) == (403, "host_not_allowed")
        assert "--allowed-hosts" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/models", "/metrics"])
@pytest.mark.parametrize(
    "origin", ["http://page.example", "https://localhost.example", "http://localhost:3000", "null"]
)
def test_a_page_of_another_site_gets_nothing(toy: Running, path: str, origin: str) -> None:
    method = "POST" if path in POSTS else "GET"
    response = toy.http.request(method, path, content=CHAT_BODY, headers={"origin": origin})
    assert code_of(response) == (403, "origin_not_allowed")
    assert "--cors-origins" in response.json()["error"]["message"]


def test_the_servers_own_page_and_what_is_no_page_may_ask(toy: Running) -> None:
    for origin in (toy.url, "chrome-extension://abcdef", "tauri://localhost"):
        assert toy.http.post(CHAT, content=CHAT_BODY, headers={"origin": origin}).status_code == 200
    at_localhost = {"origin": "http://localhost:9", "host": "LocalHost:9"}
    assert toy.http.post(CHAT, content=CHAT_BODY, headers=at_localhost).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "a.localhost:1",
        "127.0.0.1",
        "127.8.0.1:80",
        "[::1]:80",
        "10.1.1.7:80",
    ],
)
def test_loopback_names_and_addresses_are_always_the_servers_own(host: str) -> None:
    assert passes(guard(), host)


@pytest.mark.parametrize("host", ["", "page.example", "deskside", "localhost@page.example", "[", "a b", "1.2.3.4.5"])
def test_other_names_are_not(host: str) -> None:
    assert not passes(guard(), host)


def test_names_can_be_given() -> None:
    judge = guard(allowed_hosts=("API.company.example", "*.lan"))
    assert all(passes(judge, host) for host in ("api.company.example:443", "gpu.lan", "a.b.lan.", "localhost"))
    assert not any(passes(judge, host) for host in ("company.example", "x.api.company.example", "lan", "evillan"))
    # Behind a proxy that passes on neither its name nor its port, its own pages are known by the name.
    assert passes(judge, "127.0.0.1:8080", "https://api.company.example")
    assert not passes(judge, "127.0.0.1:8080", "https://other.example")
    assert passes(guard(allowed_hosts=("*",)), "any.example")
    assert not passes(guard(allowed_hosts=("*",)), "any.example", "http://page.example")


def test_on_a_network_the_names_of_networks_and_containers_are_known() -> None:
    judge = guard(bind="0.0.0.0")
    assert all(passes(judge, host) for host in ("deskside:8080", "host.docker.internal:8080", "10.0.0.5", "localhost"))
    assert not passes(judge, "page.example")
    named = guard(bind="gpu.company.example")
    assert passes(named, "gpu.company.example:8080")
    assert not passes(named, "other.company.example")


def test_origins_that_are_named_may_ask() -> None:
    judge = guard(cors_origins=("http://Page.example/",))
    assert passes(judge, "localhost", "http://page.example")
    assert not passes(judge, "localhost", "http://page.example.evil.example")
    assert passes(guard(cors_origins=("*",)), "localhost", "http://any.example")


def test_a_key_makes_names_needless() -> None:
    """A page does not know the key."""
    with serving(config=RuntimeConfig(slots=2, api_key="sesame")) as running:
        headers = {"host": "api.company.example", "origin": "http://page.example"}
        assert running.http.post(CHAT, content=CHAT_BODY, headers=headers).status_code == 401
        headers |= {"authorization": "Bearer sesame"}
        assert running.http.post(CHAT, content=CHAT_BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "name"),
    [("A.B:1", "a.b"), ("[::1]:8", "::1"), ("a.", "a"), ("", ""), ("[::1", ""), (" a ", "a"), ("*.lan", "*.lan")],
)
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name
