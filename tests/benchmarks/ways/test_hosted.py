"""The spending cap holds whatever the answers cost; recorded calls are given back for the same questions only."""

import random
from datetime import date
from pathlib import Path

import pytest

from benchmarks.cost import CallPrice, known_price
from benchmarks.errors import BadRecord, BadWorkload
from benchmarks.record import RequestSample
from benchmarks.ways.hosted import (
    HostedRecording,
    SpendingCap,
    cost_of,
    load_calls,
    read_price,
    replayed_answers,
    save_recording,
)
from benchmarks.ways.record import WayAnswer

PRICE = CallPrice("test", input=1.0, output=4.0)


def sample(prompt: int | None, completion: int | None, *, retry_s: float | None = None) -> RequestSample:
    return RequestSample(
        id="1",
        label="a",
        scheduled_s=0,
        sent_s=0,
        finished_s=1,
        prompt_tokens=prompt,
        completion_tokens=completion,
        retry_after_s=retry_s,
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_call_is_made_that_could_exceed_the_cap(seed: int) -> None:
    chance = random.Random(seed)
    cap = SpendingCap(0.02, PRICE)
    spent, n_calls, in_flight = 0.0, 0, list[tuple[float, int]]()
    for _ in range(400):
        n_bytes = chance.randint(200, 3000)
        reserved = cap.reserve(n_bytes, 20)
        if reserved is not None:
            n_calls += 1
            in_flight.append((reserved, n_bytes))
        while in_flight and (len(in_flight) > 4 or chance.random() < 0.5):
            held, size = in_flight.pop(chance.randrange(len(in_flight)))
            prompt, completion = round(size * chance.uniform(0.25, 0.28)), chance.randint(1, 20)
            spent += PRICE.of(prompt, completion)
            cap.settle(held, size, sample(prompt, completion))
    assert cap.n_refused == 400 - n_calls > 0
    assert spent == pytest.approx(cap.spent_usd)
    assert spent <= 0.02
    assert spent > 0.012, "bytes count as tokens only until answers have shown better"


def test_a_call_without_usage_costs_what_was_set_aside_and_a_refused_one_nothing() -> None:
    cap = SpendingCap(1, PRICE)
    reserved = cap.reserve(1000, 10)
    assert reserved == PRICE.of(1000, 10)
    cap.settle(reserved, 1000, sample(None, None, retry_s=1))
    assert cap.spent_usd == 0
    assert cap.reserve(1000, 10) == reserved
    cap.settle(reserved, 1000, sample(None, None))
    assert cap.spent_usd == reserved


def test_earlier_answers_count() -> None:
    answer = WayAnswer(id="1", label="a", answer="a", prompt_tokens=900, completion_tokens=20)
    cap = SpendingCap(0.001, PRICE, [answer])
    assert cap.spent_usd == cost_of(answer, PRICE) == pytest.approx(0.00098)
    assert cap.reserve(100, 1) is None


def test_prices() -> None:
    price = read_price("0.1,0.4")
    assert price is not None
    assert price.of(1_000_000, 500_000) == pytest.approx(0.3)
    assert read_price(None) is None
    for bad in ("1", "a,b", "-1,2", "1,inf"):
        with pytest.raises(BadWorkload, match="--price"):
            read_price(bad)
    known = known_price("gpt-4.1", "https://api.openai.com/v1", date(2026, 11, 1))
    assert known is not None
    assert known.of(1_000_000, 0) > known.of(1_000_000, 0, cached=900_000) > 0
    assert known_price("no-such-model", "http://127.0.0.1/v1", date(2026, 11, 1)) is None


def test_recorded_calls_are_given_back_for_the_same_questions(tmp_path: Path) -> None:
    answers = tuple(WayAnswer(id=str(i), label="a", answer="b", asked=f"h{i}", took_s=0.5) for i in range(3))
    made = HostedRecording(url="u", model="m", task="t", recorded_at="now", calls=answers)
    path = tmp_path / "calls.json"
    save_recording(path, made)
    found = load_calls(path)
    assert found == made
    assert replayed_answers(found, path, [("2", "h2"), ("0", "h0")]) == [answers[2], answers[0]]
    with pytest.raises(BadWorkload, match=r"no answer to 1 of 2 .* the prompt, the examples shown"):
        replayed_answers(found, path, [("2", "h2"), ("0", "other")])
    with pytest.raises(BadWorkload, match="recorded with fewer examples"):
        replayed_answers(found, path, [("7", "h7")])
    path.write_text('{"kind": "hosted calls"}')
    with pytest.raises(BadRecord, match="holds no recorded calls"):
        load_calls(path)
