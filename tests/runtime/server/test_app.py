"""The server over a real socket, asked by the official client and by raw HTTP: each route, each field, each form."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion
from prometheus_client.parser import text_string_to_metric_families

from runtime.config import RuntimeConfig
from tests.support.runtime.fakes import BOS, FakeLlama
from tests.support.runtime.serving import Running, serving, wait_until

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    """A model that always says the same."""
    with serving(FakeLlama(script="hello, world")) as running:
        yield running


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """A model whose answer depends on every token before it, and whose draws depend on the seed."""
    with serving(FakeLlama(n_ctx=2048)) as running:
        yield running


def events_of(response: httpx.Response) -> list[Any]:
    """The parsed events of a stream, which must end in [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_chat_through_the_official_client(scripted: Running) -> None:
    answer = scripted.client().chat.completions.create(model="toy", messages=MESSAGES)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello, world", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens in (12, 13)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "toy"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint == "deskside-toy-fake"


def test_a_streamed_chat_through_the_official_client(scripted: Running) -> None:
    stream = scripted.client().chat.completions.create(
        model="toy", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello, world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


def test_a_stream_has_no_usage_unless_asked(scripted: Running) -> None:
    response = scripted.http.post(CHAT, json={"messages": MESSAGES, "stream": True})
    assert all("usage" not in event for event in events_of(response))


def test_completions_take_all_four_prompt_forms(scripted: Running) -> None:
    client = scripted.client()
    forms: list[tuple[Any, int]] = [("ab", 1), (["ab", "cd"], 2), ([97, 98], 1), ([[97], [98, 99]], 2)]
    for prompt, count in forms:
        answer = client.completions.create(model="toy", prompt=prompt, max_tokens=5)
        assert [choice.text for choice in answer.choices] == ["hello"] * count
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
    streamed = client.completions.create(model="toy", prompt=["ab", "cd"], max_tokens=5, stream=True)
    texts = {0: "", 1: ""}
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "hello", 1: "hello"}


def test_a_text_prompt_begins_with_bos_and_token_ids_are_taken_as_they_are(scripted: Running) -> None:
    counts = [
        scripted.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
        for prompt in ("abc", [97, 98, 99], ["abc", "d"])
    ]
    assert counts == [4, 3, 6]


@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"max_tokens": 3}, "hel", "length"),
        ({"max_completion_tokens": 3}, "hel", "length"),
        ({"stop": "o,"}, "hell", "stop"),
        ({"stop": ["zzz", "wor"]}, "hello, ", "stop"),
        ({"logit_bias": {str(ord("h")): -100}, "max_tokens": 1, "temperature": 0}, None, "length"),
        ({"ignore_eos": True, "max_tokens": 40}, None, "length"),
    ],
)
def test_each_field_that_bends_the_answer(scripted: Running, fields: dict[str, Any], text: str, reason: str) -> None:
    answer = scripted.http.post(CHAT, json={"messages": MESSAGES, **fields}).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == reason
    if text is not None:
        assert choice["message"]["content"] == text
    if "logit_bias" in fields:
        assert not choice["message"]["content"].startswith("h")
    if "ignore_eos" in fields:
        assert answer["usage"]["completion_tokens"] == 40


def ask(running: Running, **fields: Any) -> dict[str, Any]:
    response = running.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 24, **fields})
    assert response.status_code == 200, response.text
    parsed: dict[str, Any] = response.json()
    ChatCompletion.model_validate(parsed)
    return parsed


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


@pytest.mark.parametrize("change", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}])
def test_each_field_that_narrows_the_draw_makes_it_greedy_at_its_end(noisy: Running, change: dict[str, Any]) -> None:
    greedy = texts(ask(noisy, temperature=0))
    drawn = {texts(ask(noisy, seed=seed))[0] for seed in range(4)}
    assert len(drawn) == 4
    assert [texts(ask(noisy, seed=seed, **change)) for seed in range(4)] == [greedy] * 4


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_change_what_repeats(name: str) -> None:
    with serving(FakeLlama(script=lambda _: ord("a"))) as running:
        plain = texts(ask(running, temperature=0, max_tokens=100))[0]
        bent = texts(ask(running, temperature=0, max_tokens=100, **{name: 2}))[0]
    assert plain == "a" * 100
    assert (bent != plain) == (name == "frequency_penalty")  # the script's lead of 40 outweighs one penalty of 2


def test_a_seed_repeats_and_choices_count_it_up(noisy: Running) -> None:
    three = texts(ask(noisy, seed=41, n=3))
    assert len(set(three)) == 3
    assert [texts(ask(noisy, seed=41 + index))[0] for index in range(3)] == three
    assert texts(ask(noisy, seed=-5)) == texts(ask(noisy, seed=-5))
    assert texts(ask(noisy)) != texts(ask(noisy))


def test_n_shares_the_prompt_in_usage(noisy: Running) -> None:
    one, four = ask(noisy, n=1)["usage"], ask(noisy, n=4)["usage"]
    assert four["prompt_tokens"] == one["prompt_tokens"]
    assert four["completion_tokens"] > one["completion_tokens"]


def test_cached_tokens_are_reported_for_a_prompt_that_was_seen(noisy: Running) -> None:
    messages = [{"role": "user", "content": "a prompt of its own, seen for the first time " * 4}]
    first = ask(noisy, messages=messages, temperature=0)
    again = ask(noisy, messages=messages, temperature=0)
    assert texts(first) == texts(again)
    prompt = again["usage"]["prompt_tokens"]
    assert 0.9 * prompt < again["usage"]["prompt_tokens_details"]["cached_tokens"] < prompt
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 0.5 * prompt


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 3}, {"stop": "e", "n": 2}])
def test_a_stream_folds_to_the_whole_answer(noisy: Running, fields: dict[str, Any]) -> None:
    whole = ask(noisy, seed=7, **fields)
    body = {"messages": MESSAGES, "max_tokens": 24, "seed": 7, **fields}
    extra = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of(noisy.http.post(CHAT, json=body | extra))
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if fields.get("logprobs"):
            tokens = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
            assert tokens == choice["logprobs"]["content"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]


def test_logprobs_of_a_chat_and_of_a_completion(scripted: Running) -> None:
    chat = scripted.client().chat.completions.create(
        model="toy", messages=MESSAGES, logprobs=True, top_logprobs=2, temperature=0
    )
    assert chat.choices[0].logprobs is not None
    tokens = chat.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == "hello, world"
    assert all(token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 2 for token in tokens)
    assert all(-0.1 < token.logprob <= 0 for token in tokens)
    completion = scripted.client().completions.create(model="toy", prompt="x", logprobs=2, max_tokens=5, temperature=0)
    found = completion.choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.text_offset) == (list("hello"), [0, 1, 2, 3, 4])
    assert [len(top) for top in found.top_logprobs or []] == [2] * 5


def test_many_clients_at_once_get_the_same_answer_as_one(noisy: Running) -> None:
    alone = texts(ask(noisy, seed=3))
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda _: texts(ask(noisy, seed=3)), range(12)))
    assert together == [alone] * 12
    wait_until(lambda: noisy.supervisor.live == 0)


def test_models_are_listed_and_looked_up(scripted: Running) -> None:
    client = scripted.client()
    listed = client.models.list().data
    assert [(model.id, model.object, model.owned_by) for model in listed] == [("toy", "model", "deskside")]
    assert client.models.retrieve("toy") == listed[0]
    assert scripted.http.get("/v1/models").json()["data"][0]["meta"]["n_ctx"] == 512
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_tokenize_and_detokenize_are_inverse(scripted: Running) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return scripted.http.post(path, json=body).raise_for_status().json()

    text = "héllo <end_of_turn>"
    tokens = post("/tokenize", {"content": text})["tokens"]
    assert post("/detokenize", {"tokens": tokens}) == {"content": text}
    plain = post("/tokenize", {"content": text, "parse_special": False, "add_special": True})["tokens"]
    assert plain == [BOS, *text.encode()]
    pieces = post("/tokenize", {"content": "é", "with_pieces": True})["tokens"]
    assert pieces == [{"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]
    assert post("/detokenize", {"tokens": [0xC3]}) == {"content": "\ufffd"}
    assert post("/detokenize", {"tokens": []}) == {"content": ""}


def test_apply_template_shows_what_a_chat_is_asked_with(scripted: Running) -> None:
    answer = scripted.http.post("/apply-template", json={"messages": MESSAGES}).json()
    assert answer == {"prompt": "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"}


def test_health_and_metrics(scripted: Running) -> None:
    ask(scripted)
    wait_until(lambda: scripted.supervisor.live == 0)
    for path in ("/health", "/health/ready", "/health/live"):
        answer = scripted.http.get(path)
        assert answer.status_code == 200
        assert answer.json().items() >= {"status": "ok", "live": True, "ready": True, "model": "toy"}.items()
    families = text_string_to_metric_families(scripted.http.get("/metrics").text)
    found = {(s.name, s.labels.get("route")): s.value for family in families for s in family.samples}
    assert found["deskside_live", None] == 0
    assert found["deskside_generated_tokens_total", None] >= 12
    assert found["deskside_http_requests_total", CHAT] >= 1
    assert found["deskside_time_to_first_token_seconds_count", None] >= 1


def test_an_api_key_is_asked_for_everywhere_but_at_health() -> None:
    with serving(config=RuntimeConfig(slots=2, api_key="sesame")) as running:
        assert running.http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Basic sesame"}):
            answer = running.http.post(CHAT, json={"messages": MESSAGES}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert running.http.get("/metrics", headers=headers).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            running.client("wrong").models.list()
        answered = running.client("sesame").chat.completions.create(model="toy", messages=MESSAGES)
        assert answered.choices[0].message.content == "hello"


def test_cross_origin_pages_may_call_only_when_named(scripted: Running) -> None:
    asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in scripted.http.options(CHAT, headers=asked).headers
    with serving(config=RuntimeConfig(slots=2, cors_origins=("http://page",))) as running:
        assert running.http.options(CHAT, headers=asked).headers["access-control-allow-origin"] == "http://page"
