"""The replay draws what was recorded, and says that it does."""

import asyncio
import random

import httpx
import pytest

from benchmarks.errors import BadWorkload
from benchmarks.load.client import ApiTarget, OpenAiClient
from benchmarks.load.replay import Recording, load_recording, replaying
from benchmarks.load.workload import LabelledExample
from benchmarks.record import RequestSample
from models.common.stats import quantile

FAST = Recording("t", "m", "h", 100, ((0.5, 1.0), (0.9, 2.0), (0.99, 3.0)), "w", "s", "d")


def test_the_quantile_function_goes_through_the_recorded_points() -> None:
    recording = load_recording()
    assert recording.n_requests == 13083
    for probability, ms in ((0.5, 575), (0.9, 1007), (0.95, 1248), (0.99, 1844)):
        assert recording.latency_ms(probability) == pytest.approx(ms)
    assert recording.latency_ms(1 - 1e-12) == pytest.approx(6507)


def test_the_quantile_function_rises() -> None:
    latencies = [load_recording().latency_ms(i / 1000) for i in range(1, 1000)]
    assert latencies == sorted(latencies)
    assert latencies[0] > 50


def test_draws_have_the_recorded_quantiles() -> None:
    recording, source = load_recording(), random.Random(7)
    draws = [recording.latency_ms(source.random()) for _ in range(20_000)]
    for q, ms in ((0.5, 575), (0.9, 1007), (0.95, 1248), (0.99, 1844)):
        assert quantile(draws, q) == pytest.approx(ms, rel=0.06)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(BadWorkload, match="classification"):
        load_recording("poetry")


def test_the_server_answers_replayed_to_our_client() -> None:
    async def once(url: str) -> RequestSample:
        client = OpenAiClient(ApiTarget(url, "m"), asyncio.get_running_loop().time)
        try:
            return await client.chat(LabelledExample("id", "mail", "spam"), "mail", 0.0)
        finally:
            await client.close()

    with replaying(FAST, seed=0) as (url, model):
        sample = asyncio.run(once(url))
        assert model == "replayed:m"
        assert httpx.get(f"{url}/models", trust_env=False).json()["data"][0]["id"] == "replayed:m"
        assert httpx.post(f"{url}/chat/completions", json={"stream": False}, trust_env=False).status_code == 400
        assert httpx.post(f"{url}/embeddings", json={}, trust_env=False).status_code == 404
    assert sample.error is None
    assert sample.text == "replayed"
    assert 1000 * (sample.finished_s - sample.sent_s) >= FAST.latency_ms(random.Random(0).random())
