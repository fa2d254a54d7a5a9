"""Adapters of one base in one engine: each answer as if its adapter were alone, and nothing shared between them."""

import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import BatchInvalid, DecodeAborted, ModelUnknown
from runtime.requests import Failed, Finished, Request, SamplingParams, Scored, Scoring, ScoringPrompt
from tests.support.runtime.fakes import END_OF_TURN, FakeLlama

from .test_engine import ends, ids_of, naive, nothing_left, run, tokens_of
from .test_prefix import SHARED, cached, computed

NAMES = ("mails", "tickets")


def asked(name: str, text: str, adapter: str | None, params: SamplingParams | None = None) -> Request:
    return Request(name, tokens_of(text), params or SamplingParams(8, temperature=0), adapter)


def mixed(n: int) -> list[Request]:
    return [asked(str(i), "mail " * (i % 4 + 1), (None, *NAMES)[i % 3]) for i in range(n)]


def test_a_mixed_crowd_answers_as_each_alone() -> None:
    llama = FakeLlama(n_ctx=1024, adapters=NAMES)
    requests = mixed(12)
    events = run(Engine(llama, EngineOptions(step_tokens=24, max_running=5)), *requests)
    answers = {r.id: ids_of(events, r.id) for r in requests}
    assert answers == {r.id: naive(llama, r) for r in requests}
    assert len({tuple(answers[name]) for name in "048"}) == 3, "one prompt, three adapters: the fake tells them apart"


def test_sixteen_arrivals_under_two_adapters_compute_their_prefix_once_each() -> None:
    llama = FakeLlama(n_ctx=2048, adapters=NAMES)
    params = SamplingParams(4, temperature=0, ignore_eos=True)
    requests = [Request(str(i), (*SHARED, *range(100 + i, 110 + i)), params, NAMES[i % 2]) for i in range(16)]
    events = run(Engine(llama), *requests)
    shared = {name: count for name, count in cached(events).items() if count != 300}
    assert sum(shared.values()) == 0
    assert len(shared) == 2
    assert computed(llama) == 2 * 300 + 16 * (10 + 3)


def test_an_idle_prefix_is_not_found_under_another_adapter() -> None:
    llama = FakeLlama(adapters=NAMES)
    engine = Engine(llama)
    for name, adapter, found in (("1", "mails", 0), ("2", "tickets", 0), ("3", None, 0), ("4", "mails", 9)):
        assert cached(run(engine, asked(name, "0123456789", adapter))) == {name: found}


def test_an_engine_with_nothing_but_one_adapter_never_changes_it() -> None:
    llama = FakeLlama(adapters=NAMES)
    run(Engine(llama), *(asked(str(i), "hello", "mails") for i in range(5)))
    assert set(llama.applied) == {"mails"}


@pytest.mark.parametrize("adapter", ["mail", ""])
def test_an_adapter_that_is_not_loaded_is_refused_by_name(adapter: str) -> None:
    engine = Engine(FakeLlama(adapters=NAMES))
    for work in (asked("x", "hello", adapter), Scoring("x", (ScoringPrompt((1,), ((2,),), (END_OF_TURN,)),), adapter)):
        with pytest.raises(ModelUnknown, match=r"'mail'|''") as raised:
            engine.add(work)
        assert "['mails', 'tickets']" in str(raised.value)
    assert not engine.has_work


@pytest.mark.parametrize("error", [DecodeAborted("2"), BatchInvalid("-1")], ids=lambda e: type(e).__name__)
def test_a_poisonous_sequence_fails_alone_among_adapters(error: Exception) -> None:
    def refuse(number: int, batch: object) -> None:
        if ord("!") in batch.tokens:  # type: ignore[attr-defined]
            raise error

    llama = FakeLlama(on_decode=refuse, adapters=NAMES)
    bias = {ord("!"): -100.0}
    params = SamplingParams(8, temperature=0, logit_bias=bias)
    good = [asked(str(i), "good", (None, *NAMES)[i % 3], params) for i in range(6)]
    engine = Engine(llama)
    events = run(engine, *good[:3], asked("bad", "bad!", "mails", params), *good[3:])
    assert isinstance(ends(events)["bad"], Failed)
    assert {r.id: ids_of(events, r.id) for r in good} == {r.id: naive(llama, r) for r in good}
    nothing_left(engine, llama)


def test_preempted_answers_go_on_under_their_adapters() -> None:
    llama = FakeLlama(n_ctx=64, adapters=NAMES)
    params = SamplingParams(40, temperature=1, seed=5, ignore_eos=True)
    requests = [asked(str(i), f"mail {i}", (None, *NAMES)[i % 3], params) for i in range(6)]
    engine = Engine(llama, EngineOptions())
    events = run(engine, *requests)
    assert engine.stats().preemptions_total > 0
    assert {r.id: ids_of(events, r.id) for r in requests} == {r.id: naive(llama, r) for r in requests}
    nothing_left(engine, llama)


def test_choices_are_weighed_under_their_adapter() -> None:
    question = ScoringPrompt(tokens_of("which?"), (tuple(b"ham"), tuple(b"spam"), tuple(b"spice")), (END_OF_TURN,))
    scored: dict[str | None, tuple[tuple[float, ...], ...]] = {}
    for adapters in (("mails",), (None,), ("mails", None, "tickets", "mails")):
        llama = FakeLlama(adapters=NAMES)
        asks = [Scoring(f"{i} {adapter}", (question,), adapter) for i, adapter in enumerate(adapters)]
        engine = Engine(llama)
        for ask in asks:
            engine.add(ask)
        ended = ends(run(engine))
        for ask in asks:
            end = ended[ask.id]
            assert isinstance(end, Scored)
            assert scored.setdefault(ask.adapter, end.logprobs) == end.logprobs
    assert len(set(scored.values())) == 3


def test_cancelling_the_last_of_an_adapter_ends_its_turns() -> None:
    llama = FakeLlama(adapters=NAMES)
    engine = Engine(llama)
    engine.add(asked("gone", "hello", "mails", SamplingParams(50, temperature=0, ignore_eos=True)))
    engine.add(asked("kept", "hello", "tickets"))
    engine.step()
    engine.cancel("gone")
    events = run(engine)
    assert isinstance(ends(events)["kept"], Finished)
    assert set(llama.applied[1:]) == {"tickets"}
    nothing_left(engine, llama)
