"""Prefixes that left the KV cache: saved, restored and cut, and never a wrong one, whatever the state can bear."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions, snapshot_bytes
from runtime.errors import EngineError
from runtime.kv_cache.prefix_cache import ALIGN
from runtime.requests import Finished, Request, SamplingParams
from tests.support.runtime.fakes import FakeLlama

from .test_engine import ends, ids_of, run

GREEDY = SamplingParams(4, temperature=0, ignore_eos=True)


def text(name: int, n_tokens: int) -> tuple[int, ...]:
    """Tokens of which no two names share the first."""
    return tuple((name * 37 + 11 * k + k * k) % 200 if k else name for k in range(n_tokens))


def ask(engine: Engine, prompt: tuple[int, ...]) -> tuple[int, list[int]]:
    """(tokens of the prompt that were not computed, the answer) of a request alone."""
    events = run(engine, Request("x", prompt, GREEDY))
    end = ends(events)["x"]
    assert isinstance(end, Finished)
    return end.usage.cached_tokens, ids_of(events, "x")


def requests_of(asked: list[tuple[list[int], int]]) -> list[Request]:
    """A request for each: parts that others may share, and an end of its own; every fourth under an adapter."""
    return [
        Request(
            str(k),
            tuple(token for part in parts for token in text(part, 40)) + tuple(range(tail)),
            GREEDY,
            adapter="mails" if tail % 4 == 0 else None,
        )
        for k, (parts, tail) in enumerate(asked)
    ]


def with_store(llama: FakeLlama, n_bytes: int = 1 << 20) -> Engine:
    return Engine(llama, EngineOptions(snapshot_bytes=n_bytes))


@pytest.mark.parametrize("window", [None, 64, 0])
def test_conversations_in_turn_go_on_where_they_were(window: int | None) -> None:
    """Each of six has 100 tokens more every turn, and 512 cells hold one of them only."""
    engine = with_store(FakeLlama(window=window))
    talks = {name: text(name, 100) for name in range(6)}
    for turn in range(4):
        for name, prompt in talks.items():
            cached, answer = ask(engine, prompt)
            assert cached >= (len(prompt) - 105 - (window is not None) * ALIGN if turn else 0), (
                "but for the answer, which is as soon computed"
            )
            talks[name] = (*prompt, *answer, *text(name, 100))


@pytest.mark.parametrize("window", [None, 64, 0])
def test_a_second_round_of_prompts_computes_their_last_tokens_only(window: int | None) -> None:
    llama = FakeLlama(window=window)
    engine = with_store(llama)
    first = [ask(engine, text(name, 200)) for name in range(10)]
    second = [ask(engine, text(name, 200)) for name in range(10)]
    assert [cached for cached, _ in first] == [0] * 10
    assert [cached for cached, _ in second] == [198 if window is None else 192] * 10
    assert [answer for _, answer in second] == [answer for _, answer in first]


@pytest.mark.parametrize("window", [None, 64, 0])
def test_a_beginning_that_two_have_shared_is_found_by_a_third(window: int | None) -> None:
    engine = with_store(FakeLlama(window=window))
    for own in (1, 2):
        ask(engine, (*text(0, 120), *text(own, 30)))
    for other in range(3, 9):
        ask(engine, text(other, 120))
    assert ask(engine, (*text(0, 120), *text(9, 30)))[0] == (120 if window is None else 64)


def test_many_at_once_share_what_one_restored() -> None:
    llama = FakeLlama(n_ctx=1024)
    engine = with_store(llama)
    ask(engine, text(0, 200))
    for other in range(1, 9):
        ask(engine, text(other, 200))
    llama.restored = 0
    events = run(engine, *(Request(str(k), (*text(0, 200), *text(k, 20)), GREEDY) for k in range(8)))
    assert llama.restored == 1
    assert [end.usage.cached_tokens for end in ends(events).values() if isinstance(end, Finished)] == [200] * 8


def test_a_prefix_is_never_shared_between_adapters() -> None:
    llama = FakeLlama(adapters=("mails",))
    engine = with_store(llama)
    ask(engine, text(0, 200))
    for other in range(1, 5):
        ask(engine, text(other, 200))
    events = run(engine, Request("x", text(0, 200), GREEDY, adapter="mails"))
    end = ends(events)["x"]
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 0


def test_a_snapshot_that_is_refused_is_computed_instead_and_forgotten() -> None:
    llama = FakeLlama()
    engine = with_store(llama)
    expected = [ask(engine, text(name, 200)) for name in range(6)]
    llama.snapshots_refused = True
    assert [ask(engine, text(name, 200))[1] for name in range(6)] == [answer for _, answer in expected]
    assert llama.restored == 0
    llama.snapshots_refused = False
    assert ask(engine, text(0, 200))[0] == 198, "it was saved again"


def test_a_state_that_cannot_be_saved_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(seq_id: int) -> None:
        raise EngineError(f"no state of {seq_id}")

    llama = FakeLlama()
    monkeypatch.setattr(llama, "save", fails)
    engine = with_store(llama)
    first = [ask(engine, text(name, 200)) for name in range(6)]
    assert [ask(engine, text(name, 200))[1] for name in range(6)] == [answer for _, answer in first]


def test_different_prompts_leave_the_memory_flat() -> None:
    llama = FakeLlama()
    engine = with_store(llama, 20_000)
    for k in range(300):
        ask(engine, (k % 200, k // 200, *text(k % 200, 60)))
        assert engine.stats().snapshot_bytes <= 20_000
        engine.check({seq_id: len(tokens) for seq_id, tokens in llama.sequences.items()})
    assert llama.saved > 200


def test_nothing_is_saved_while_everything_fits_the_cells() -> None:
    llama = FakeLlama(n_ctx=4096)
    engine = with_store(llama)
    for name in range(5):
        ask(engine, text(name, 100))
    assert llama.saved == 0


@given(
    window=st.sampled_from([None, 0, 40, 100]),
    n_bytes=st.sampled_from([0, 3000, 1 << 20]),
    fast=st.booleans(),
    rounds=st.lists(
        st.lists(
            st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 20)), min_size=1, max_size=5
        ),
        max_size=8,
    ),
    refused=st.sets(st.integers(0, 7)),
)
@settings(max_examples=60, deadline=None)
def test_any_requests_are_answered_as_if_each_were_alone(
    window: int | None,
    n_bytes: int,
    fast: bool,
    rounds: list[list[tuple[list[int], int]]],
    refused: set[int],
) -> None:
    """The fake fails the test where a token looks at a cell that is gone, or of another adapter."""
    adapters = ("mails",)
    llama = FakeLlama(n_ctx=300, n_seq_max=8, window=window, adapters=adapters)
    engine = Engine(llama, EngineOptions(snapshot_bytes=n_bytes, fast=fast, max_running=4))
    for place, asked in enumerate(rounds):
        llama.snapshots_refused = place in refused
        requests = requests_of(asked)
        events = run(engine, *requests)
        assert Counter(map(type, ends(events).values())) == {Finished: len(requests)}
        for request in requests:
            alone = FakeLlama(n_ctx=300, adapters=adapters)
            expected = run(Engine(alone), request)
            assert ids_of(events, request.id) == ids_of(expected, request.id)
        engine.check({seq_id: len(tokens) for seq_id, tokens in llama.sequences.items()})


@pytest.mark.parametrize(
    ("prefix_memory", "memory_budget", "n_bytes"),
    [(0.0, None, 0), (2.0, 1.0, 2 << 30), (None, 20.0, 1 << 30), (None, 5.0, 1 << 29)],
)
def test_the_default_leaves_a_small_budget_to_the_models(
    prefix_memory: float | None, memory_budget: float | None, n_bytes: int
) -> None:
    assert snapshot_bytes(prefix_memory, memory_budget) == n_bytes
