"""The timed client against a server that answers, and one that fails in every way."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.load.client import ApiTarget, OpenAiClient
from benchmarks.load.workload import LabelledExample
from benchmarks.record import RequestSample
from tests.support.benchmarks.stand_in import StandIn, running


def ask(
    url: str, text: str, *, chat: bool = True, key: str | None = None, body: dict[str, Any] | None = None
) -> RequestSample:
    ticks = itertools.count()
    clock: Callable[[], float] = lambda: float(next(ticks))  # noqa: E731

    async def once() -> RequestSample:
        client = OpenAiClient(ApiTarget(url, "m", key, body or {}), clock, timeout_s=20)
        try:
            send = client.chat if chat else client.complete
            return await send(LabelledExample("id", text, "spam"), text, -1.0, max_tokens=8)
        finally:
            await client.close()

    return asyncio.run(once())


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_is_timed_and_counted(chat: bool) -> None:
    app = StandIn(lambda _: "spam")
    with running(app) as url:
        sample = ask(url, "Buy now", chat=chat, key="secret")
    assert sample.error is None
    assert sample.text == "spam"
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (7, 3, 5)
    assert sample.scheduled_s < sample.sent_s < sample.deltas_s[0] <= sample.deltas_s[-1] <= sample.finished_s
    assert app.paths == ["/v1/chat/completions" if chat else "/v1/completions"]
    assert app.headers[0][b"authorization"] == b"Bearer secret"
    assert "secret" not in sample.model_dump_json()


@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_connection_is_kept_or_not(keep_alive: bool) -> None:
    app = StandIn(lambda _: "spam")

    async def twice(url: str) -> None:
        client = OpenAiClient(ApiTarget(url, "m"), lambda: 0.0, timeout_s=20, keep_alive=keep_alive)
        for _ in range(2):
            assert (await client.chat(LabelledExample("id", "Buy", "spam"), "Buy", 0.0)).error is None
        await client.close()

    with running(app) as url:
        asyncio.run(twice(url))
    assert len(set(app.clients)) == (1 if keep_alive else 2)


def test_the_body_is_streamed_with_usage_and_can_be_overridden() -> None:
    app = StandIn(lambda _: "x")
    with running(app) as url:
        ask(url, "hello", body={"max_tokens": None, "max_completion_tokens": 9})
    body = app.bodies[0]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("HTTP500", "HTTP 500"),
        ("DROP", "RemoteProtocolError"),
        ("ERROREVENT", "the engine died"),
        ("NOFINISH", "without a finish reason"),
        ("GARBAGE", "JSONDecodeError"),
    ],
)
def test_a_fault_becomes_the_samples_error(fault: str, says: str) -> None:
    with running(StandIn(lambda _: "spam")) as url:
        sample = ask(url, f"mail {fault}")
    assert sample.error is not None
    assert says in sample.error
    assert sample.finished_s >= sample.sent_s


def test_no_server_is_an_error_too() -> None:
    sample = ask("http://127.0.0.1:9/v1", "mail")
    assert sample.error is not None
    assert "ConnectError" in sample.error


def test_a_decision_comes_whole_and_its_faults_become_errors() -> None:
    app = StandIn(lambda prompt: "spam")

    async def decide(url: str) -> list[RequestSample]:
        client = OpenAiClient(ApiTarget(url, "m"), lambda: 0.5)
        questions = [{"type": "choice"}]
        try:
            return [
                await client.decide(LabelledExample("1", t, "spam"), t, 0.0, questions=questions)
                for t in ("hi", "HTTP500")
            ]
        finally:
            await client.close()

    with running(app) as url:
        good, bad = asyncio.run(decide(url))
    assert (good.text, good.error, good.prompt_tokens, good.deltas_s, good.finished_s) == ("spam", None, 7, (0.5,), 0.5)
    assert app.bodies[0] == {"model": "m", "input": "hi", "questions": [{"type": "choice"}]}
    assert bad.error is not None
    assert "HTTP 500" in bad.error
