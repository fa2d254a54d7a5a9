"""Embeddings on the fake: the vectors a naive loop gives, turns with text, one terminal event on every path."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from msgspec import structs

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import (
    BatchInvalid,
    Cancelled,
    ContextTooLong,
    DecodeFailed,
    EngineError,
    InvalidRequest,
    ModelUnknown,
)
from runtime.llama.interface import Batch, Pooling
from runtime.requests import (
    Embedded,
    Embedding,
    Event,
    Failed,
    Finished,
    Request,
    SamplingParams,
    TextDelta,
    Usage,
    Work,
)
from tests.support.runtime.fakes import BOS, FAKE_VOCAB, FakeLlama

POISON = b"\x00"[0]
FAST = EngineOptions(fast=True)


def texts(name: str, *contents: str) -> Embedding:
    return Embedding(name, tuple((BOS, *content.encode()) for content in contents))


def chat(name: str, tokens: int = 8) -> Request:
    return Request(name, (BOS, *b"hello"), SamplingParams(tokens, temperature=0, ignore_eos=True))


def naive(llama: FakeLlama, prompt: tuple[int, ...], adapter: str | None = None) -> np.ndarray:
    rows = np.stack([llama.row(prompt[: end + 1], adapter) for end in range(len(prompt))])
    pooled = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[llama.info.pooling]
    vector: np.ndarray = pooled / np.linalg.norm(pooled)
    return vector


def run(engine: Engine, *work: Work) -> dict[str, Event]:
    """The terminal event of each; a second one fails the test."""
    for one in work:
        engine.add(one)
    return finish(engine)


def finish(engine: Engine) -> dict[str, Event]:
    terminal: dict[str, Event] = {}
    for _ in range(2000):
        if not engine.has_work:
            return terminal
        for event in engine.step():
            if not isinstance(event, TextDelta):
                assert event.request_id not in terminal
                terminal[event.request_id] = event
    raise AssertionError(f"still at work: {engine.stats()}")


def vectors(event: Event) -> np.ndarray:
    assert isinstance(event, Embedded), event
    return event.vectors


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_are_the_pooled_rows_of_each_text_alone(pooling: Pooling) -> None:
    llama = FakeLlama()
    llama.info = replace(llama.info, pooling=pooling)
    one = texts("one", "short", "x" * 200, "another", *(f"text {n}" for n in range(40)))
    two = texts("two", "a neighbour of some length, longer than one batch holds")
    ended = run(Engine(llama), one, two)
    for asked in (one, two):
        got = vectors(ended[asked.id])
        assert got.dtype == np.float32
        for vector, prompt in zip(got, asked.prompts, strict=True):
            np.testing.assert_allclose(vector, naive(llama, prompt), atol=1e-5)
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


def test_usage_and_totals_count_every_token() -> None:
    engine = Engine(FakeLlama())
    asked = texts("one", "abc", "defgh")
    event = run(engine, asked)["one"]
    assert isinstance(event, Embedded)
    assert event.usage == Usage(prompt_tokens=4 + 6, cached_tokens=0, completion_tokens=0)
    assert engine.stats().prompt_tokens_total == 10


def test_several_texts_and_requests_go_into_one_decode() -> None:
    batches: list[Batch] = []
    llama = FakeLlama(on_embed=batches.append)
    run(Engine(llama, FAST), texts("one", "abc", "def"), texts("two", "ghi", "jkl"))
    assert [len(set(batch.seq_ids.tolist())) for batch in batches] == [4]


def test_text_and_embeddings_take_turns_and_the_text_is_as_without() -> None:
    order: list[str] = []
    llama = FakeLlama(on_decode=lambda *_: order.append("text"), on_embed=lambda _: order.append("embed"))
    engine = Engine(llama)
    alone = Engine(FakeLlama())
    engine.add(chat("c"))
    alone.add(chat("c"))
    engine.add(texts("e", *("x" * 100 for _ in range(6))))
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    expected: list[Event] = []
    while alone.has_work:
        expected += alone.step()
    assert [event for event in events if not isinstance(event, Embedded)] == expected
    both = order[: len(order) - order[::-1].index("text")]
    assert max(len(list(run)) for _, run in groupby(both)) == 1, "neither steps twice while the other waits"
    assert order.count("embed") > order.count("text"), "and goes on alone"


def test_a_long_request_does_not_hold_up_a_short_one() -> None:
    engine = Engine(FakeLlama())
    engine.add(texts("long", *(f"text number {n}" for n in range(50))))
    engine.step()
    engine.add(texts("short", "hello"))
    ended = [event.request_id for _ in range(2) for event in engine.step()]
    assert ended == ["short"]
    assert set(finish(engine)) == {"long"}


def poisoned(batch: Batch) -> None:
    if POISON in batch.tokens:
        raise BatchInvalid("poison")


def test_a_failing_request_harms_no_neighbour() -> None:
    failures = 0

    def counted(batch: Batch) -> None:
        nonlocal failures
        failures += POISON in batch.tokens
        poisoned(batch)

    llama = FakeLlama(on_embed=counted)
    engine = Engine(llama, FAST)
    good = [texts(f"good{n}", f"text {n}", "y" * 80) for n in range(3)]
    ended = run(engine, good[0], texts("bad", "fine", "\0"), good[1], chat("chat"), good[2])
    assert isinstance(ended.pop("bad"), Failed)
    assert failures == 3, "once in company, twice alone"
    assert isinstance(ended.pop("chat"), Finished)
    for asked in good:
        for vector, prompt in zip(vectors(ended[asked.id]), asked.prompts, strict=True):
            np.testing.assert_allclose(vector, naive(llama, prompt), atol=1e-5)


@pytest.mark.parametrize("error", [DecodeFailed("llama_decode gave -3"), RuntimeError("a bug")])
def test_a_context_that_fails_always_fails_embeddings_only(error: Exception) -> None:
    def broken(_: Batch) -> None:
        raise error

    engine = Engine(FakeLlama(on_embed=broken))
    ended = run(engine, texts("a", "one"), chat("chat"), texts("b", "two"))
    assert [type(ended[name]) for name in ("a", "b", "chat")] == [Failed, Failed, Finished]
    assert engine.failure is None


def test_a_text_that_failed_half_way_begins_again() -> None:
    calls = 0

    def third(_: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise DecodeFailed("once")

    llama = FakeLlama(on_embed=third)
    asked = [texts("long", "x" * 70, "z"), texts("other", "y" * 40)]
    ended = run(Engine(llama, FAST), *asked)
    for one in asked:
        for vector, prompt in zip(vectors(ended[one.id]), one.prompts, strict=True):
            np.testing.assert_allclose(vector, naive(llama, prompt), atol=1e-5)


@pytest.mark.parametrize("steps", range(6))
def test_cancel_ends_it_at_once_wherever_it_is(steps: int) -> None:
    engine = Engine(FakeLlama())
    kept = texts("kept", "z" * 50)
    for work in (texts("gone", "x" * 90), kept):
        engine.add(work)
    before = {event.request_id: event for _ in range(steps) for event in engine.step()}
    events = engine.cancel("gone")
    if "gone" not in before:
        assert [(event.request_id, type(getattr(event, "error", None))) for event in events] == [("gone", Cancelled)]
    assert engine.cancel("gone") == []
    ended = before | finish(engine)
    np.testing.assert_allclose(vectors(ended["kept"])[0], naive(FakeLlama(), kept.prompts[0]), atol=1e-5)
    assert not engine.has_work


def test_a_fatal_error_of_the_text_ends_embeddings_too() -> None:
    engine = Engine(FakeLlama(fail_at={0: DecodeFailed("fatal")}))
    ended = run(engine, texts("e", "x" * 200), chat("c"))
    assert {name: type(event) for name, event in ended.items()} == {"e": Failed, "c": Failed}


def test_a_vector_that_is_no_direction_is_an_error() -> None:
    llama = FakeLlama()
    llama.row = lambda history, adapter=None: np.full(llama.info.n_embd, np.nan, np.float32)  # type: ignore[method-assign]
    event = run(Engine(llama), texts("e", "x"))["e"]
    assert isinstance(event, Failed)
    assert type(event.error) is EngineError


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [
        ((), InvalidRequest),
        (((),), InvalidRequest),
        (((FAKE_VOCAB,),), InvalidRequest),
        (((65,) * 257,), ContextTooLong),
    ],
)
def test_what_the_edge_should_have_refused(prompts: tuple[tuple[int, ...], ...], kind: type[Exception]) -> None:
    engine = Engine(FakeLlama())
    with pytest.raises(kind):
        engine.add(Embedding("e", prompts))
    assert not engine.has_work


def test_a_decode_has_one_adapter_and_nobody_starves() -> None:
    llama = FakeLlama(adapters=("a", "b"))
    asked = [
        structs.replace(texts(f"{adapter}{n}", f"text {n}", "y" * 50, "z"), adapter=adapter)
        for n in range(3)
        for adapter in (None, "a", "b")
    ]
    ended = run(Engine(llama), *asked)
    for one in asked:
        for vector, prompt in zip(vectors(ended[one.id]), one.prompts, strict=True):
            np.testing.assert_allclose(vector, naive(llama, prompt, one.adapter), atol=1e-5)


def test_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelUnknown, match="'a' is not loaded"):
        Engine(FakeLlama()).add(structs.replace(texts("e", "x"), adapter="a"))


def test_an_id_is_live_once() -> None:
    engine = Engine(FakeLlama())
    engine.add(texts("e", "x"))
    with pytest.raises(InvalidRequest, match="already live"):
        engine.add(chat("e"))
