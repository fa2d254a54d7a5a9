"""Behaviours that users of other local servers count on, and that no other test here asks for over HTTP.

The checklist is llama-server's own unit tests: what they hold of chats, completions, limits, keys, origins and metrics.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.config import RuntimeConfig
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import Running, serving, wait_until

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER: dict[str, Any] = {"role": "user", "content": "hi"}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETION: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    "/v1/decisions": {},
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [65]},
    "/apply-template": {"messages": [USER]},
}


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """A server whose model says anything."""
    with serving(FakeLlama(n_ctx=1024)) as running:
        yield running


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = response.raise_for_status().text.splitlines()
    assert [line for line in lines if line][-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [{"content": "hello"}],
        [{"role": "system", "content": "test"}, {}],
    ],
)
def test_messages_that_are_none_are_a_400_whatever_they_are(noisy: Running, messages: object) -> None:
    for body in ({"messages": messages}, {"messages": messages, "stream": True}):
        response = noisy.http.post(CHAT, json=body)
        assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
        assert response.json()["error"]["param"].startswith("messages")


def test_a_chats_tokens_are_those_of_its_rendered_template(noisy: Running) -> None:
    messages = [{"role": "system", "content": "be <brief>"}, USER]
    prompt = noisy.http.post("/apply-template", json={"messages": messages}).json()["prompt"]
    tokens = noisy.http.post("/tokenize", json={"content": prompt}).json()["tokens"]
    usage = noisy.http.post(CHAT, json={"messages": messages, "max_tokens": 3}).json()["usage"]
    assert usage["prompt_tokens"] == len(tokens)
    assert usage["total_tokens"] == len(tokens) + usage["completion_tokens"]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_an_answer_that_never_ends_is_cut_at_the_contexts_end(path: str) -> None:
    """No context shift: what was written stays as it was, and the answer says `length`."""
    with serving(FakeLlama(n_ctx=128, script="ab" * 200)) as toy:
        n_prompt = toy.http.post(path, json=BODIES[path] | {"max_tokens": 1}).json()["usage"]["prompt_tokens"]
        # A chat may have what the context leaves; a completion has to ask for it.
        body = BODIES[path] | ({"max_tokens": 128 - n_prompt} if path == COMPLETION else {})
        whole = toy.http.post(path, json=body).json()
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["total_tokens"] == 128
        streamed = chunks_of(toy.http.post(path, json=body | {"stream": True}))
        assert [c["choices"][0]["finish_reason"] for c in streamed if c["choices"][0]["finish_reason"]] == ["length"]
        assert streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_the_size_of_a_step_does_not_change_an_answer() -> None:
    answers = set()
    for n_batch in (4, 32, 512):
        with serving(FakeLlama(n_ctx=1024, n_batch=n_batch)) as toy:
            for temperature in (0, 1):
                body = {"messages": [USER], "seed": 5, "temperature": temperature, "max_tokens": 20}
                answers.add((temperature, toy.http.post(CHAT, json=body).json()["choices"][0]["message"]["content"]))
    assert len(answers) == 2


def test_a_prompt_found_in_the_cache_is_answered_as_before(noisy: Running) -> None:
    body = {"messages": [{"role": "user", "content": "found again " * 8}], "temperature": 0, "max_tokens": 12}
    first, second = (noisy.http.post(CHAT, json=body).json() for _ in range(2))
    assert second["choices"] == first["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"] // 2
    assert second["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]


def test_seeds_hold_whatever_else_is_being_answered(noisy: Running) -> None:
    def ask(seed: int) -> str:
        body = {"messages": [USER], "seed": seed, "temperature": 1.5, "max_tokens": 16}
        text: str = noisy.http.post(CHAT, json=body).raise_for_status().json()["choices"][0]["message"]["content"]
        return text

    alone = [ask(seed) for seed in range(3)]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, [0, 1, 2] * 3)) == alone * 3


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_biased_token_is_all_that_is_said_or_never_said(noisy: Running, path: str) -> None:
    body = BODIES[path] | {"max_tokens": 30, "temperature": 1, "seed": 3}

    def text(bias: dict[str, int]) -> str:
        choice = noisy.http.post(path, json=body | {"logit_bias": bias}).json()["choices"][0]
        said: str = choice["text"] if path == COMPLETION else choice["message"]["content"]
        return said

    assert text({str(ord("z")): 100}) == "z" * 30
    assert not set(text({str(n): -100 for n in range(256) if chr(n) != "q"})) - {"q"}


def test_streamed_text_is_never_cut_within_a_character() -> None:
    said = "é € 😀 日本 ñ"
    with serving(FakeLlama(script=said)) as toy:
        chunks = chunks_of(toy.http.post(CHAT, json={"messages": [USER], "stream": True, "temperature": 0}))
        pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        assert "".join(pieces) == said
        assert not any("\ufffd" in piece for piece in pieces)
        events = toy.http.post(RESPONSES, json={"input": "hi", "stream": True, "temperature": 0}).text
        assert "\ufffd" not in events
        assert json.dumps(said, ensure_ascii=False) in events


def test_requests_that_fit_alone_but_not_together_all_succeed() -> None:
    """Four answers of 70 + 55 tokens share a cache of 256 cells: they take turns, and none is dropped."""
    with serving(FakeLlama(n_ctx=256)) as toy:
        body = {"temperature": 0, "max_tokens": 55, "ignore_eos": True}
        prompts = [letter * 69 for letter in "abcd"]

        def ask(prompt: str) -> dict[str, Any]:
            response = toy.http.post(COMPLETION, json=body | {"prompt": prompt})
            answer: dict[str, Any] = response.raise_for_status().json()
            return answer

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(ask, prompts))
        assert [answer["usage"]["completion_tokens"] for answer in together] == [55] * 4
        assert [answer["choices"] for answer in together] == [ask(prompt)["choices"] for prompt in prompts]


def test_metrics_count_what_usage_says_and_come_to_rest(noisy: Running) -> None:
    def read() -> dict[str, float]:
        wait_until(lambda: (noisy.supervisor.live, noisy.supervisor.stats().running) == (0, 0))
        families = text_string_to_metric_families(noisy.http.get("/metrics").text)
        return {s.name: s.value for family in families for s in family.samples if s.labels == {"model": "toy"}}

    before = read()
    usages = [
        noisy.http.post(CHAT, json={"messages": [USER], "max_tokens": 9}).json()["usage"],
        noisy.http.post(COMPLETION, json={"prompt": "hello there", "max_tokens": 5}).json()["usage"],
    ]
    response = noisy.http.post(RESPONSES, json={"input": "hi", "max_output_tokens": 7}).json()["usage"]
    after = read()
    prompt = sum(usage["prompt_tokens"] for usage in usages) + response["input_tokens"]
    generated = sum(usage["completion_tokens"] for usage in usages) + response["output_tokens"]
    assert after["deskside_prompt_tokens_total"] - before["deskside_prompt_tokens_total"] == prompt
    assert after["deskside_generated_tokens_total"] - before["deskside_generated_tokens_total"] == generated
    assert (after["deskside_running"], after["deskside_waiting"], after["deskside_live"]) == (0, 0, 0)


def test_every_route_but_health_wants_the_key() -> None:
    with serving(config=RuntimeConfig(slots=2, api_key="sesame", cors_origins=("http://page",))) as toy:
        values = ["Bearer", "sesame", "Basic sesame", "Bearer sesame2", "Bearer SESAME", "Bearer séame"]
        wrong: list[dict[bytes, bytes]] = [{}, *({b"Authorization": value.encode()} for value in values)]
        for headers in wrong:
            for path, body in BODIES.items():
                refused = toy.http.post(path, json=body, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
                assert refused.json()["error"]["code"] == "invalid_api_key"
            for path in ("/v1/models", "/v1/models/toy", "/metrics"):
                assert toy.http.get(path, headers=headers).status_code == 401
        assert toy.llama.decodes == 0
        for path in ("/health", "/health/live", "/health/ready"):
            assert toy.http.get(path).status_code == 200
        assert toy.client("sesame").responses.create(model="toy", input="hi").output_text == "hello"
        with pytest.raises(openai.AuthenticationError):
            toy.client("wrong").responses.create(model="toy", input="hi")


def test_a_browser_may_ask_first_without_the_key_and_may_read_a_refusal() -> None:
    with serving(config=RuntimeConfig(slots=2, api_key="sesame", cors_origins=("http://page",))) as toy:
        asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
        asked |= {"Access-Control-Request-Headers": "Authorization, Content-Type"}
        for path in BODIES:
            allowed = toy.http.options(path, headers=asked)
            assert allowed.status_code == 200
            assert allowed.headers["access-control-allow-origin"] == "http://page"
            assert "POST" in allowed.headers["access-control-allow-methods"]
            assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
            other = toy.http.options(path, headers=asked | {"Origin": "http://other"})
            assert "access-control-allow-origin" not in other.headers
        refused = toy.http.post(CHAT, json=BODIES[CHAT], headers={"Origin": "http://page"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://page")
