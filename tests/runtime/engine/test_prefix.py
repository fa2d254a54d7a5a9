"""Shared prefixes through the whole engine: what is computed, counted in the fake's batches, and what usage says."""

import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.requests import Event, Failed, Finished, Request, SamplingParams
from tests.support.runtime.fakes import FakeLlama

from .test_engine import ends, run, text_of

SHARED = tuple(b"Sort each mail. " * 20)[:300]
GREEDY = SamplingParams(4, temperature=0)


def mail(name: str, shared: tuple[int, ...] = SHARED) -> Request:
    """A prompt of 300 tokens that all mails share and 10 of its own, none of which begin alike."""
    return Request(name, (*shared, *(150 + int(name) + k for k in range(10))), GREEDY)


def computed(llama: FakeLlama) -> int:
    return sum(len(batch.tokens) for batch in llama.batches)


def cached(events: list[Event]) -> dict[str, int]:
    return {name: end.usage.cached_tokens for name, end in ends(events).items() if isinstance(end, Finished)}


@pytest.mark.parametrize("step_tokens", [64, 512])
def test_sixteen_arrivals_with_one_new_prefix_compute_it_once(step_tokens: int) -> None:
    llama = FakeLlama(n_ctx=2048, script="spam")
    events = run(Engine(llama, EngineOptions(step_tokens)), *(mail(str(i)) for i in range(16)))
    assert computed(llama) == 300 + 16 * (10 + 3)
    assert cached(events) == {str(i): 300 if i else 0 for i in range(16)}
    assert {text_of(events, str(i)) for i in range(16)} == {"spam"}


def test_a_first_that_is_cancelled_in_mid_prefill_leaves_the_work_to_the_next_alone() -> None:
    llama = FakeLlama(n_ctx=2048, script="spam")
    engine = Engine(llama, EngineOptions(step_tokens=128))
    for i in range(16):
        engine.add(mail(str(i)))
    events = engine.step()
    events += engine.cancel("0")
    while engine.has_work:
        events += engine.step()
    assert isinstance(ends(events)["0"], Failed)
    assert computed(llama) == 128 + 300 + 15 * (10 + 3)
    assert cached(events) == {str(i): 300 if i > 1 else 0 for i in range(1, 16)}


def test_a_preempted_answer_counts_only_what_its_first_start_found() -> None:
    llama = FakeLlama(n_ctx=700, script="a story that is so long that there is no room for all of it" * 3)
    params = SamplingParams(150, temperature=0)
    requests = [Request(str(i), mail(str(i)).prompt, params) for i in range(4)]
    engine = Engine(llama, EngineOptions())
    events = run(engine, *requests)
    assert engine.stats().preemptions_total > 0
    assert cached(events) == {"0": 0, "1": 300, "2": 300, "3": 300}
    assert engine.stats().cached_tokens_total == 900
