"""What can go wrong on the wire: hostile bodies, full queues, clients that leave, engines that break, signals."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import httpx
import openai
import pytest
from pydantic import ValidationError

from runtime.config import RuntimeConfig
from runtime.errors import DecodeFailed, LoadFailed
from runtime.server import http as server_body
from runtime.server.native import DetokenizeBody
from runtime.server.serve import listen
from tests.support.runtime.connection import asked
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.observed import Observed
from tests.support.runtime.serving import Gate, Running, serving, wait_until

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
LONG = "hello " * 50
# Valid JSON, but no object.
PLAIN_JSON = (b"[]", b"null", b'"text"')


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(config=RuntimeConfig(slots=4, queue=8, max_body_bytes=200_000)) as running:
        yield running


def error_of(response: httpx.Response, status: int, code: str | None) -> dict[str, Any]:
    """The error object, which must have OpenAI's shape and these values."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", "/v1/responses", "/tokenize", "/detokenize", "/apply-template"]
)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"messages": NaN}',
        b'{"temperature": Infinity}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b"\xff\xfe{}",
        '{"prompt": "x"}'.encode("utf-16"),
        b'{"prompt": "\\ud800", "content": "\\ud800"}',
        *PLAIN_JSON,
    ],
    ids=lambda value: repr(value[:24]),
)
def test_a_body_that_is_no_good_json_object_is_a_400(toy: Running, path: str, body: bytes) -> None:
    error_of(toy.http.post(path, content=body), 400, None if body not in PLAIN_JSON else ANY)


def test_a_pair_of_surrogates_is_a_character(toy: Running) -> None:
    body = b'{"content": "\\ud83d\\ude00"}'
    assert toy.http.post("/tokenize", content=body).json() == {"tokens": list("😀".encode())}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {"messages": MESSAGES, "typo": 1}, "typo"),
        (CHAT, {"messages": MESSAGES, "logit_bias": {"260": 1}}, "logit_bias"),
        (CHAT, {"messages": MESSAGES, "n": 1000}, "n"),
        ("/v1/completions", {"prompt": "x", "echo": "yes"}, "echo"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": [260]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [10**30]]}, "prompt"),
        ("/tokenize", {"content": 7}, "content"),
        ("/tokenize", {"content": "x", "extra": 1}, "extra"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/apply-template", {"messages": []}, "messages"),
    ],
)
def test_a_refusal_names_the_field(toy: Running, path: str, body: dict[str, Any], param: str) -> None:
    response = toy.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_more_choices_than_can_ever_wait_are_refused_for_good(toy: Running) -> None:
    assert error_of(toy.http.post(CHAT, json={"messages": MESSAGES, "n": 13}), 400, None)["param"] == "n"


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_another_model_is_a_404_that_names_the_served_one(toy: Running, path: str) -> None:
    error = error_of(
        toy.http.post(path, json={"messages": MESSAGES, "model": "gpt-9"})
        if path == CHAT
        else toy.http.post(path, json={"content": "x", "model": "gpt-9"}),
        404,
        "model_not_found",
    )
    assert "'gpt-9'" in error["message"]
    assert "'toy'" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_the_context_is_a_400_before_any_byte(toy: Running, stream: bool) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    error = error_of(toy.http.post(CHAT, json={"messages": long, "stream": stream}), 400, "context_length_exceeded")
    assert "512" in error["message"]
    body = {"messages": MESSAGES, "stream": stream, "max_tokens": 511}
    error = error_of(toy.http.post(CHAT, json=body), 400, "context_length_exceeded")
    assert "511" in error["message"]
    assert "maximum context length is 512 tokens" in error["message"], "clients know the error by OpenAI's words"
    assert error["param"] == "max_tokens"
    for prompt in ("x" * 600, [65] * 600, ["x", "x" * 600]):
        answer = toy.http.post("/v1/completions", json={"prompt": prompt, "stream": stream})
        assert error_of(answer, 400, "context_length_exceeded")["param"] == "prompt"


def test_a_body_over_the_limit_is_a_413_by_its_length_and_while_it_comes(toy: Running) -> None:
    large = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    error = error_of(toy.http.post("/v1/completions", content=large), 413, "body_too_large")
    assert "200000" in error["message"]
    chunks = (large[start : start + 10_000] for start in range(0, len(large), 10_000))
    error_of(toy.http.post("/v1/completions", content=chunks), 413, "body_too_large")
    assert toy.http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_unknown_routes_and_methods_have_openais_shape_too(toy: Running) -> None:
    error_of(toy.http.get("/v1/nothing"), 404, "not_found")
    error_of(toy.http.post("/v1/images/generations", json={}), 404, "not_found")
    response = toy.http.get(CHAT)
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_base_model_says_that_it_cannot_be_talked_to() -> None:
    llama = FakeLlama(script="hello")
    llama.info = replace(llama.info, chat_template=None)
    with serving(llama) as running:
        for path in (CHAT, "/apply-template"):
            error = error_of(running.http.post(path, json={"messages": MESSAGES}), 400, "not_a_chat_model")
            assert "/v1/completions" in error["message"]
        answer = running.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
        assert answer.json()["choices"][0]["text"] == "hello"


def test_large_bodies_are_prepared_off_the_event_loop(toy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    encode = toy.llama.tokenizer.encode

    def watched(text: str, **options: bool) -> list[int]:
        threads.add(threading.current_thread().name)
        return encode(text, **options)

    monkeypatch.setattr(toy.llama.tokenizer, "encode", watched)
    toy.http.post("/tokenize", json={"content": "x"})
    on_the_loop = set(threads)
    threads.clear()
    assert toy.http.post("/tokenize", json={"content": "ü" * 8000}).status_code == 200
    assert threads
    assert not threads & on_the_loop


def test_texts_and_lists_far_beyond_any_prompt_are_not_tokenised(toy: Running) -> None:
    limit = 16 * toy.llama.info.n_ctx
    for path, body in (("/tokenize", {"content": "x" * (limit + 1)}), ("/detokenize", {"tokens": [65] * (limit + 1)})):
        error = error_of(toy.http.post(path, json=body), 400, None)
        assert str(limit) in error["message"]
        assert str(limit + 1) in error["message"]
    assert len(toy.http.post("/tokenize", json={"content": "x" * limit}).json()["tokens"]) == limit


@pytest.mark.parametrize(
    "body",
    [
        {f"field {n}": 1 for n in range(4097)},
        {"messages": [{"role": "user", "content": "x"} | {f"field {n}": 1 for n in range(4097)}]},
    ],
    ids=["outside", "inside"],
)
def test_an_object_of_very_many_fields_is_refused_before_each_is_judged(toy: Running, body: dict[str, Any]) -> None:
    assert "limit 4096" in error_of(toy.http.post(CHAT, json=body), 400, None)["message"]


def test_only_the_first_of_many_bad_ids_is_judged() -> None:
    with pytest.raises(ValidationError) as caught:
        DetokenizeBody.model_validate({"tokens": ["x"] * 1000})
    assert caught.value.error_count() == 1


def test_a_body_that_never_ends_is_a_408(toy: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_body, "READ_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", int(toy.url.rsplit(":", 1)[1]))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(f"{head}{{".encode())
        answer = b""
        while part := connection.recv(10_000):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"body_too_slow" in answer


def background(pool: ThreadPoolExecutor, running: Running, **fields: Any) -> Future[httpx.Response]:
    body = {"messages": MESSAGES, "max_tokens": 5} | fields
    return pool.submit(lambda: httpx.post(running.url + CHAT, json=body, timeout=30))


def test_a_full_queue_is_a_429_with_retry_after() -> None:
    gate = Gate()
    config = RuntimeConfig(slots=1, queue=2)
    with serving(FakeLlama(script=LONG, on_decode=gate), config) as running, ThreadPoolExecutor(3) as pool:
        answers = [background(pool, running) for _ in range(3)]
        wait_until(lambda: running.supervisor.live == 3)
        refused = running.http.post(CHAT, json={"messages": MESSAGES})
        error = error_of(refused, 429, "queue_full")
        assert "limit 3" in error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            running.client().chat.completions.create(model="toy", messages=MESSAGES)
        gate.open()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert running.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 5}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots(stream: bool, n: int) -> None:
    gate = Gate()
    llama = FakeLlama(script=LONG * 5, n_ctx=4096, on_decode=gate)
    with serving(llama, RuntimeConfig(slots=2, queue=4)) as running:
        observed = Observed(running.supervisor)
        with asked(running.url, CHAT, {"messages": MESSAGES, "max_tokens": 1000, "n": n, "stream": stream}) as client:
            for _ in range(3):
                gate.wait()
                gate.open(1)
            if stream:
                assert b"200 OK" in client.recv(1000)
        wait_until(lambda: len(observed.cancelled) == n)
        n_passed = llama.decodes
        gate.open()
        wait_until(lambda: running.supervisor.live == 0)
        assert llama.decodes < n_passed + 3, "the answer was written on for nobody"
        stats = running.supervisor.stats
        wait_until(lambda: (stats().running, stats().waiting) == (0, 0))
        assert running.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 5}).status_code == 200


def test_a_client_that_does_not_read_holds_nobody_up() -> None:
    llama = FakeLlama(script=LONG * 5, n_ctx=4096)
    with serving(llama, RuntimeConfig(slots=2, queue=4)) as running:
        running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        fields = {"messages": MESSAGES, "max_tokens": 250, "stream": True, "logprobs": True, "top_logprobs": 20}
        with asked(running.url, CHAT, fields, buffer_bytes=4096):
            wait_until(lambda: running.supervisor.stats().generated_tokens_total > 10)
            assert running.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 5}).status_code == 200
            wait_until(lambda: running.supervisor.live == 0)
            ended = f'deskside_http_requests_total{{route="{CHAT}",status="200"}} 1.0'
            assert ended in running.http.get("/metrics").text, "the stalled stream should still be waiting to be read"


def test_an_engine_that_breaks_ends_a_stream_in_an_error_event() -> None:
    llama = FakeLlama(script=LONG, fail_at={4: DecodeFailed("llama_decode returned -3")})
    with serving(llama) as running:
        response = httpx.post(running.url + CHAT, json={"messages": MESSAGES, "stream": True}, timeout=30)
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert response.status_code == 200
        assert json.loads(events[-1])["error"]["code"] == "decode_failed"
        assert sum("error" in json.loads(event) for event in events) == 1
        assert "hel" in "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


def test_an_engine_that_breaks_fails_every_answer_and_then_the_server_stops() -> None:
    gate = Gate()
    llama = FakeLlama(script=LONG, on_decode=gate, fail_at={1: DecodeFailed("llama_decode returned -3")})
    with serving(llama, RuntimeConfig(slots=2, queue=8)) as running, ThreadPoolExecutor(6) as pool:
        answers = [background(pool, running, max_tokens=50) for _ in range(6)]
        wait_until(lambda: running.supervisor.live == 6)
        gate.open()
        for answer in answers:
            error_of(answer.result(), 500, "decode_failed")
        wait_until(lambda: running.server.should_exit)
        assert running.supervisor.state == "failed"
        assert running.supervisor.live == 0


def test_the_client_library_raises_what_an_error_event_says() -> None:
    with serving(FakeLlama(script=LONG, fail_at={3: DecodeFailed("broken")})) as running:
        stream = running.client().chat.completions.create(model="toy", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="broken"):
            list(stream)


def test_a_signal_drains_refuses_newcomers_and_finishes_what_runs() -> None:
    gate = Gate()
    with serving(FakeLlama(script="hello", on_decode=gate)) as running, ThreadPoolExecutor(2) as pool:
        answers = [background(pool, running), background(pool, running, stream=True)]
        wait_until(lambda: running.supervisor.live == 2)
        running.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: running.supervisor.state == "draining")
        error_of(running.http.post(CHAT, json={"messages": MESSAGES}), 503, "shutting_down")
        health = running.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        assert running.http.get("/health/live").status_code == 200
        running.http.close()
        gate.open()
        assert answers[0].result().json()["choices"][0]["message"]["content"] == "hello"
        assert answers[1].result().text.endswith("data: [DONE]\n\n")
        wait_until(lambda: running.supervisor.state == "stopped")


def test_a_drain_that_takes_too_long_ends_answers_with_an_error() -> None:
    gate = Gate()
    config = RuntimeConfig(slots=2, drain_seconds=0)
    llama = FakeLlama(script=LONG * 5, n_ctx=4096, on_decode=gate)
    with serving(llama, config) as running, ThreadPoolExecutor(2) as pool:
        answers = [background(pool, running, max_tokens=1000, stream=stream) for stream in (False, True)]
        wait_until(lambda: running.supervisor.live == 2)
        running.server.handle_exit(signal.SIGTERM, None)
        while running.supervisor.live:
            gate.open(1)
            threading.Event().wait(0.002)
        gate.open()
        error_of(answers[0].result(), 503, "shutting_down")
        last = [line for line in answers[1].result().text.split("\n\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_taken_port_is_told_with_the_way_out() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(LoadFailed, match=rf"127\.0\.0\.1:{port}: .*try another --port"):
            listen("127.0.0.1", port)
