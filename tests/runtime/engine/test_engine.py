"""The engine on the fake: the same answers as one by one, one terminal event on every path, nothing left behind."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.decoding.sampling import Sampler
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import (
    BatchInvalid,
    Cancelled,
    ContextTooLong,
    DecodeAborted,
    DecodeFailed,
    EngineError,
    InvalidRequest,
    NoKvSlot,
    ShuttingDown,
)
from runtime.requests import Embedded, Event, Failed, Finished, Request, SamplingParams, Scored, TextDelta
from tests.support.runtime.fakes import END_OF_TURN, EOS, FakeLlama, FakeTokenizer, adapted


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(FakeTokenizer().encode(text, add_special=True, parse_special=False))


def asked(name: str, text: str = "hello", params: SamplingParams | None = None) -> Request:
    return Request(name, tokens_of(text), params or SamplingParams(8, temperature=0))


def run(engine: Engine, *requests: Request, limit: int = 5000) -> list[Event]:
    for request in requests:
        engine.add(request)
    events: list[Event] = []
    for _ in range(limit):
        if not engine.has_work:
            return events
        events += engine.step()
    raise AssertionError(f"still at work after {limit} steps: {engine.stats()}")


def ends(events: list[Event]) -> dict[str, Finished | Scored | Embedded | Failed]:
    """The terminal event of each request; more than one fails the test."""
    terminal = [event for event in events if not isinstance(event, TextDelta)]
    assert max(Counter(event.request_id for event in terminal).values(), default=1) == 1
    return {event.request_id: event for event in terminal}


def text_of(events: list[Event], name: str) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta) and e.request_id == name)


def ids_of(events: list[Event], name: str) -> list[int]:
    return [t for e in events if isinstance(e, TextDelta) and e.request_id == name for t in e.token_ids]


def naive(llama: FakeLlama, request: Request) -> list[int]:
    """The answer token by token from the pure function, no engine: end tokens left out."""
    sampler = Sampler(request.params, FakeTokenizer.end_tokens)
    history, answer = list(request.prompt), list[int]()
    for _ in range(request.params.max_tokens):
        token = sampler.draw(llama.logits(adapted(tuple(history), request.adapter))).token
        if token in FakeTokenizer.end_tokens:
            break
        history.append(token)
        answer.append(token)
    return answer


def nothing_left(engine: Engine, llama: FakeLlama) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_cells_used == llama.used_cells
    engine.check({seq_id: len(tokens) for seq_id, tokens in llama.sequences.items()})
    engine.rest()
    assert engine.stats().kv_cells_used == llama.used_cells == 0


def test_a_scripted_answer_ends_with_stop_and_counts_its_tokens() -> None:
    events = run(Engine(FakeLlama(script="spam")), asked("a"))
    assert text_of(events, "a") == "spam"
    end = ends(events)["a"]
    assert isinstance(end, Finished)
    assert end.reason == "stop"
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (6, 5)


def test_max_tokens_ends_with_length() -> None:
    events = run(Engine(FakeLlama(script="a long story")), asked("a", params=SamplingParams(6, temperature=0)))
    end = ends(events)["a"]
    assert isinstance(end, Finished)
    assert (text_of(events, "a"), end.reason, end.usage.completion_tokens) == ("a long", "length", 6)


@pytest.mark.parametrize(
    ("stop", "said"), [((" st",), "a long"), (("xyz", "ng"), "a lo"), (("story!",), "a long story")]
)
def test_stop_strings_are_never_sent(stop: tuple[str, ...], said: str) -> None:
    params = SamplingParams(50, temperature=0, stop=stop)
    events = run(Engine(FakeLlama(script="a long story")), asked("a", params=params))
    assert text_of(events, "a") == said
    end = ends(events)["a"]
    assert isinstance(end, Finished)
    assert end.reason == "stop"


def test_ignore_eos_writes_on() -> None:
    params = SamplingParams(30, temperature=0, ignore_eos=True)
    events = run(Engine(FakeLlama(script="hm")), asked("a", params=params))
    assert len(ids_of(events, "a")) == 30
    assert not {EOS, END_OF_TURN} & set(ids_of(events, "a"))


def test_logprobs_come_with_their_tokens_and_bytes() -> None:
    params = SamplingParams(3, temperature=0, logprobs=2)
    events = run(Engine(FakeLlama(script="my")), asked("a", params=params))
    logprobs = [p for e in events if isinstance(e, TextDelta) for p in e.logprobs]
    assert [(p.token, p.token_bytes) for p in logprobs] == [(ord("m"), b"m"), (ord("y"), b"y")]
    assert all(p.top[0][0] == p.token and p.top[0][2] == p.logprob and len(p.top) == 2 for p in logprobs)


def test_many_together_answer_as_each_alone() -> None:
    llama = FakeLlama(n_ctx=2048)
    params = [
        SamplingParams(5 + i, temperature=i % 3 / 2, top_k=i, seed=i, frequency_penalty=0.1 * i) for i in range(12)
    ]
    requests = [asked(str(i), "mail " * i, p) for i, p in enumerate(params)]
    events = run(Engine(llama, EngineOptions(step_tokens=16, max_running=5)), *requests)
    assert {r.id: ids_of(events, r.id) for r in requests} == {r.id: naive(llama, r) for r in requests}


def test_a_prompt_seen_before_is_not_computed_again_and_usage_says_so() -> None:
    llama = FakeLlama(script="yes")
    engine = Engine(llama)
    prompt = "a rather long instruction that every mail shares: "
    run(engine, asked("a", prompt + "one"))
    computed = sum(len(batch.tokens) for batch in llama.batches)
    end = ends(run(engine, asked("b", prompt + "two")))["b"]
    assert isinstance(end, Finished)
    assert end.usage.cached_tokens == 1 + len(prompt)
    assert sum(len(batch.tokens) for batch in llama.batches) - computed == len("two") + len("yes")
    assert engine.stats().cached_tokens_total == 1 + len(prompt)


def test_a_preempted_answer_goes_on_where_it_was_and_says_nothing_twice() -> None:
    llama = FakeLlama(n_ctx=64)
    params = SamplingParams(40, temperature=1, seed=5, ignore_eos=True, stop=("\x00\x01\x02",))
    requests = [asked(str(i), f"mail {i}", params) for i in range(4)]
    engine = Engine(llama, EngineOptions())
    events = run(engine, *requests)
    assert engine.stats().preemptions_total > 0
    assert {r.id: ids_of(events, r.id) for r in requests} == {r.id: naive(llama, r) for r in requests}
    nothing_left(engine, llama)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_cancel_frees_at_once_wherever_the_request_is(steps: int) -> None:
    llama = FakeLlama(script="a long story")
    engine = Engine(llama, EngineOptions(step_tokens=8, max_running=1))
    engine.add(asked("a", "x" * 20))
    engine.add(asked("b", "y" * 20))
    for _ in range(steps):
        engine.step()
    cancelled = engine.cancel("a") + engine.cancel("b", ShuttingDown("bye"))
    assert {name: type(end.error) for name, end in ends(cancelled).items() if isinstance(end, Failed)} == {
        "a": Cancelled,
        "b": ShuttingDown,
    }
    assert not engine.has_work
    nothing_left(engine, llama)
    assert engine.cancel("a") == []


def test_cancelling_one_leaves_the_other_its_answer() -> None:
    engine = Engine(FakeLlama(script="a long story"))
    engine.add(asked("a"))
    engine.add(asked("b"))
    events = engine.step() + engine.cancel("a")
    assert text_of(events + run(engine), "b") == "a long s"


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "error", [NoKvSlot("1"), DecodeAborted("2"), BatchInvalid("-1")], ids=lambda e: type(e).__name__
)
def test_a_decode_that_fails_once_harms_nobody(at: int, error: Exception) -> None:
    llama = FakeLlama(fail_at={at: error})
    requests = [asked(str(i), "mail " * (i + 1)) for i in range(4)]
    engine = Engine(llama, EngineOptions(step_tokens=24))
    events = run(engine, *requests)
    assert {r.id: ids_of(events, r.id) for r in requests} == {r.id: naive(llama, r) for r in requests}
    assert all(isinstance(end, Finished) for end in ends(events).values())


@pytest.mark.parametrize("error", [DecodeAborted("2"), BatchInvalid("-1")], ids=lambda e: type(e).__name__)
def test_a_poisonous_sequence_fails_alone(error: Exception) -> None:
    def refuse(number: int, batch: object) -> None:
        if ord("!") in batch.tokens:  # type: ignore[attr-defined]
            raise error

    llama = FakeLlama(script="fine", on_decode=refuse)
    engine = Engine(llama)
    events = run(engine, asked("a", "good"), asked("b", "bad!"), asked("c", "also good"))
    bad = ends(events)["b"]
    assert isinstance(bad, Failed)
    assert bad.error is error
    assert [text_of(events, name) for name in "abc"] == ["fine", "", "fine"]
    nothing_left(engine, llama)


def test_cells_that_vanish_cost_time_not_answers() -> None:
    llama = FakeLlama(n_ctx=128)
    requests = [asked(str(i), "mail " * 3, SamplingParams(20, temperature=0, ignore_eos=True)) for i in range(5)]
    llama.cells_hidden = 80  # the cache believes in 128
    events = run(Engine(llama), *requests)
    assert {r.id: ids_of(events, r.id) for r in requests} == {r.id: naive(llama, r) for r in requests}


def test_no_cell_at_all_fails_the_request_instead_of_waiting_for_ever() -> None:
    llama = FakeLlama()
    llama.cells_hidden = 512
    events = run(Engine(llama), asked("a"), asked("b"))
    assert [type(end.error) for end in ends(events).values() if isinstance(end, Failed)] == [NoKvSlot, NoKvSlot]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("error", [DecodeFailed("-3"), RuntimeError("surprise")], ids=lambda e: type(e).__name__)
def test_a_fatal_error_ends_every_request_once_and_is_raised_afterwards(at: int, error: Exception) -> None:
    engine = Engine(FakeLlama(fail_at={at: error}), EngineOptions(max_running=2))
    events = run(engine, asked("a"), asked("b"), asked("c"))
    assert {name for name, end in ends(events).items() if isinstance(end, Failed)} == {"a", "b", "c"}
    assert isinstance(engine.failure, DecodeFailed)
    assert str(error) in str(engine.failure)
    for call in (engine.step, lambda: engine.add(asked("d"))):
        with pytest.raises(DecodeFailed):
            call()
    assert engine.cancel("a") == []


def break_detokenizer(llama: FakeLlama) -> None:
    spell = llama.tokenizer.token_bytes

    def broken(token: int, *, special: bool = False) -> bytes:
        if token == ord("m"):
            raise RuntimeError("no such piece")
        return spell(token, special=special)

    llama.tokenizer.token_bytes = broken  # type: ignore[method-assign]


def break_logits(llama: FakeLlama) -> None:
    pure = llama.logits

    def broken(history: tuple[int, ...]) -> np.ndarray:
        return pure(history) * (np.nan if history[-2:] == tuple(b"am") else 1)

    llama.logits = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("break_it", [break_detokenizer, break_logits])
def test_a_stage_that_breaks_for_one_answer_fails_that_one(break_it: Callable[[FakeLlama], None]) -> None:
    def script(history: tuple[int, ...]) -> int:
        answer = b"spam" if ord("1") in history else b"kind"
        said = len(history) - history.index(ord(":")) - 1
        return answer[said] if said < 4 else EOS

    llama = FakeLlama(script=script)
    break_it(llama)
    engine = Engine(llama)
    events = run(engine, asked("a", "1:"), asked("b", "2:"))
    bad = ends(events)["a"]
    assert isinstance(bad, Failed)
    assert isinstance(bad.error, RuntimeError | EngineError)
    assert text_of(events, "b") == "kind"
    nothing_left(engine, llama)


@pytest.mark.parametrize(
    ("request_", "error", "named"),
    [
        (Request("x", (), SamplingParams(1)), InvalidRequest, "no tokens"),
        (Request("x", (1, 999), SamplingParams(1)), InvalidRequest, "999"),
        (Request("x", (1,), SamplingParams(1, logit_bias={-4: 1.0})), InvalidRequest, "-4"),
        (Request("x", (1,), SamplingParams(0)), InvalidRequest, "got 0"),
        (Request("x", (1,) * 500, SamplingParams(13)), ContextTooLong, "500 prompt tokens and max_tokens 13"),
        (Request("live", (1,), SamplingParams(1)), InvalidRequest, "'live'"),
    ],
)
def test_what_the_edge_let_through_is_refused_before_anything_runs(
    request_: Request, error: type[Exception], named: str
) -> None:
    engine = Engine(FakeLlama(script="ok"))
    engine.add(asked("live"))
    with pytest.raises(error, match=named):
        engine.add(request_)
    assert set(ends(run(engine))) == {"live"}


def test_closing_frees_the_model() -> None:
    llama = FakeLlama()
    Engine(llama).close()
    assert llama.closed


class Traffic(RuleBasedStateMachine):
    """Requests come and go, decodes fail; every answer is still the naive one and nothing stays behind."""

    @initialize(
        n_ctx=st.sampled_from([48, 64, 256]),
        step_tokens=st.integers(1, 40) | st.just(100),
        running=st.integers(1, 6),
        ids=st.integers(0, 6),
        fast=st.booleans(),
    )
    def begin(self, n_ctx: int, step_tokens: int, running: int, ids: int, *, fast: bool = True) -> None:
        self.llama = FakeLlama(n_ctx=n_ctx, n_seq_max=running + ids, adapters=("a", "b"))
        self.engine = Engine(self.llama, EngineOptions(step_tokens, running, fast=fast))
        self.requests: dict[str, Request] = {}
        self.events: list[Event] = []

    @rule(
        prompt=st.lists(st.sampled_from(b"abc"), min_size=1, max_size=16),
        shared=st.integers(0, 30),
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 1.0]),
        adapter=st.sampled_from([None, None, "a", "b"]),
    )
    def ask(self, prompt: list[int], shared: int, max_tokens: int, temperature: float, adapter: str | None) -> None:
        number = len(self.requests)
        params = SamplingParams(max_tokens, temperature, seed=number, ignore_eos=number % 2 == 0)
        tokens = (*(b"the same words for everyone...."[:shared]), *prompt)
        request = Request(str(number), tokens, params, adapter)
        if len(tokens) + max_tokens <= self.llama.info.n_ctx:
            self.requests[request.id] = request
            self.engine.add(request)

    @rule(n=st.integers(1, 6))
    def work(self, n: int) -> None:
        for _ in range(n):
            self.events += self.engine.step()

    @rule(error=st.sampled_from([NoKvSlot("1"), DecodeAborted("2"), BatchInvalid("-1")]), ahead=st.integers(0, 3))
    def disturb(self, error: Exception, ahead: int) -> None:
        # once alone in the batch a sequence is to blame for the last two
        if isinstance(error, NoKvSlot) or self.engine.stats().running > 1:
            self.llama.fail_at[self.llama.decodes + (ahead if isinstance(error, NoKvSlot) else 0)] = error

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.events += self.engine.cancel(data.draw(st.sampled_from(sorted(self.requests))))

    @invariant()
    def cells_agree(self) -> None:
        stats = self.engine.stats()
        assert stats.kv_cells_used == self.llama.used_cells
        assert stats.running <= self.llama.info.n_seq_max

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.events += run(self.engine)
        terminal = ends(self.events)
        assert set(terminal) == set(self.requests)
        for name, request in self.requests.items():
            end, answer, whole = terminal[name], ids_of(self.events, name), naive(self.llama, request)
            if isinstance(end, Finished):
                assert answer == whole
                assert end.usage.cached_tokens < len(request.prompt)
            else:
                assert isinstance(end, Failed)
                assert isinstance(end.error, Cancelled | NoKvSlot | DecodeAborted | BatchInvalid)
                assert answer == whole[: len(answer)]
        nothing_left(self.engine, self.llama)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=80, stateful_step_count=25)
