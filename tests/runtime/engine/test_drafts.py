"""Drafts in the engine, on the fake: fewer decodes, no event changed, and no other request slowed down."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from runtime.decoding.grammar import Grammars
from runtime.decoding.sampling import Sampler
from runtime.engine.drafts import FIRST_LOOK, MAX_DRAFTS, Drafts
from runtime.engine.engine import Engine
from runtime.engine.generation import Generation, TextStream
from runtime.engine.options import EngineOptions
from runtime.errors import BatchInvalid, DecodeAborted, NoKvSlot
from runtime.kv_cache.prefix_cache import PrefixCache
from runtime.llama.interface import Batch
from runtime.requests import Event, Failed, Finished, Grammar, Request, SamplingParams
from runtime.scheduling.plan import ScheduledSequence
from runtime.scheduling.scheduler import Scheduler
from tests.runtime.scheduling.test_scheduler import NoOwner
from tests.support.runtime.fakes import END_OF_TURN, EOS, FakeLlama, FakeTokenizer

from .test_engine import Traffic, asked, ends, ids_of, nothing_left, run, text_of, tokens_of

STORY = "it was a dark and stormy night, and the rain fell in torrents"
COPY = f"Say again: {STORY}! Now: "
LONG = SamplingParams(80, temperature=0)


class Timed:
    """A fake with steps of simulated time: `base` and `row` seconds for every token of the batch."""

    def __init__(self, base: float = 0.018, row: float = 0.002) -> None:
        self.now, self.base, self.row = 0.0, base, row
        self.also: Callable[[int, Batch], None] | None = None

    def passes(self, number: int, batch: Batch) -> None:
        self.now += self.base + self.row * len(batch.tokens)
        if self.also is not None:
            self.also(number, batch)

    def engine(self, llama: FakeLlama, max_drafts: int | None = None, **options: int) -> Engine:
        """An engine whose model computes all rows of logits that it has room for alike."""
        llama.on_decode = self.passes
        made = EngineOptions(max_drafts=max_drafts, **options)  # type: ignore[arg-type]
        llama.info = replace(llama.info, rows_alike=made.n_outputs)
        return Engine(llama, made, clock=lambda: self.now)


def accepted(engine: Engine) -> int:
    return engine.stats().draft_tokens_accepted_total


def own(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event.request_id == name]


def plain(requests: tuple[Request, ...], script: str | Callable[[tuple[int, ...]], int]) -> list[Event]:
    return run(Engine(FakeLlama(n_ctx=4096, script=script)), *requests)


def drafted(requests: tuple[Request, ...], script: str | Callable[[tuple[int, ...]], int]) -> tuple[list[Event], int]:
    """The events with drafts, and how many decodes that took. Nothing may stay behind, and drafts must have helped."""
    llama = FakeLlama(n_ctx=4096, script=script)
    engine = Timed().engine(llama)
    events = run(engine, *requests)
    assert accepted(engine) > 0
    nothing_left(engine, llama)
    return events, llama.decodes


PARAMS: Mapping[str, SamplingParams] = {
    "greedy": LONG,
    "seeded": SamplingParams(80, temperature=6, seed=11),
    "narrowed": SamplingParams(80, temperature=6, seed=12, top_k=20, top_p=0.95, min_p=0.01),
    "penalties": SamplingParams(80, temperature=5, seed=3, presence_penalty=1.5, frequency_penalty=0.5),
    "logit bias": SamplingParams(80, temperature=0, logit_bias={ord("n"): -100.0}),
    "stop string inside": SamplingParams(80, temperature=0, stop=("zzz", "night, a")),
    "max_tokens inside": SamplingParams(23, temperature=0),
    "max_tokens at the first look": SamplingParams(FIRST_LOOK + 1, temperature=0),
    "logprobs": SamplingParams(80, temperature=3, seed=4, logprobs=3),
    "ignored end": SamplingParams(80, temperature=0, ignore_eos=True, logprobs=0),
}


@pytest.mark.parametrize("name", PARAMS)
def test_every_event_is_the_one_without_drafts(name: str) -> None:
    company = (asked("copies", COPY, LONG), asked("free", "tell me", SamplingParams(30, seed=1)))
    requests = (asked("a", COPY, PARAMS[name]), *company)
    without = plain(requests, STORY)
    events, _ = drafted(requests, STORY)
    for request in requests:
        assert own(events, request.id) == own(without, request.id)


@pytest.mark.parametrize("end", [EOS, END_OF_TURN])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_among_the_drafts_ends_the_answer(end: int, ignore_eos: bool) -> None:
    """The prompt holds the story, its end and more text behind it: the drafts run past the end."""
    prompt = (*tokens_of(STORY), end, *b"and then more\n")
    requests = (Request("a", prompt, SamplingParams(90, temperature=0, ignore_eos=ignore_eos)),)
    without = plain(requests, _story_and(end))
    events, decodes = drafted(requests, _story_and(end))
    assert events == without
    assert decodes < 40
    last = ends(events)["a"]
    assert isinstance(last, Finished)
    assert (last.reason, text_of(events, "a")[: len(STORY)]) == ("length" if ignore_eos else "stop", STORY)
    assert ignore_eos or last.usage.completion_tokens == len(STORY) + 1


def _story_and(end: int) -> Callable[[tuple[int, ...]], int]:
    answer: list[int] = [*STORY.encode(), end, *b"and then"]

    def script(history: tuple[int, ...]) -> int:
        return answer[min(len(history) - len(STORY) - 2 - len("and then more\n"), len(answer) - 1)]

    return script


def test_a_copying_answer_takes_far_fewer_decodes() -> None:
    llama = FakeLlama(script=STORY)
    engine = Timed().engine(llama)
    events = run(engine, asked("a", COPY, LONG))
    assert text_of(events, "a") == STORY
    assert llama.decodes < len(STORY) / 2.5
    stats = engine.stats()
    assert stats.draft_tokens_total >= stats.draft_tokens_accepted_total > len(STORY) / 2
    assert stats.generated_tokens_total == len(STORY) + 1


@pytest.mark.parametrize(("max_drafts", "most"), [(0, 0), (1, 1), (3, 3), (None, MAX_DRAFTS)])
def test_the_setting_bounds_the_drafts_of_an_answer(max_drafts: int | None, most: int) -> None:
    llama = FakeLlama(script=STORY)
    engine = Timed(row=0.0).engine(llama, max_drafts)
    assert text_of(run(engine, asked("a", COPY, LONG)), "a") == STORY
    assert max(len(batch.tokens) for batch in llama.batches[1:]) == 1 + most


def test_no_draft_lies_beyond_max_tokens_or_the_context() -> None:
    llama = FakeLlama(n_ctx=len(tokens_of(COPY)) + 30, script=STORY)
    engine = Timed(row=0.0).engine(llama)
    end = ends(run(engine, asked("a", COPY, SamplingParams(30, temperature=0))))["a"]
    assert isinstance(end, Finished)
    assert accepted(engine) > 0
    last = len(tokens_of(COPY)) + 30 - 1
    assert max(int(batch.positions.max()) for batch in llama.batches) < last, "the last token is never computed"


def test_a_clock_that_stands_still_changes_no_answer() -> None:
    llama = FakeLlama(script=STORY)
    engine = Timed(base=0.0, row=0.0).engine(llama)
    assert text_of(run(engine, asked("a", COPY, LONG)), "a") == STORY


def test_rows_stay_within_what_the_model_gives() -> None:
    for fast, rows_alike, most in ((True, 1, 6), (False, 10, 10), (False, 4, 4), (False, 1, 3)):
        llama = FakeLlama(n_ctx=4096, n_seq_max=6, script=STORY, rows_alike=rows_alike)
        engine = Engine(llama, EngineOptions(max_running=3, fast=fast), clock=count().__next__)
        run(engine, *(asked(name, COPY, LONG) for name in "abc"))
        decoding = [batch for batch in llama.batches if batch.wants_logits.all()]
        assert max(len(batch.tokens) for batch in decoding) == most
        assert all(batch.rows for batch in decoding)
        assert (accepted(engine) > 0) is (most > 3)


def test_where_rows_are_dear_there_are_no_drafts() -> None:
    llama = FakeLlama(n_ctx=4096, script=STORY)
    engine = Timed(base=0.0, row=0.02).engine(llama)
    run(engine, *(asked(str(i), COPY, LONG) for i in range(8)))
    tried = [batch for batch in llama.batches if batch.wants_logits.all() and len(batch.tokens) > 8]
    assert len(tried) <= 2, "one step with drafts tells that rows are dear"
    assert llama.decodes >= len(STORY)


def test_where_nothing_is_copied_drafts_stop_by_themselves() -> None:
    """Every other token is a comma, so that n-grams are found all the time, and are wrong half of the time or more."""

    def script(history: tuple[int, ...]) -> int:
        return ord(",") if history[-1] != ord(",") else 65 + hash(history) % 3

    requests = [asked(str(i), "lists", SamplingParams(200, temperature=0)) for i in range(3)]
    llama = FakeLlama(n_ctx=2048, script=script)
    timed = Timed(row=0.012)
    engine = timed.engine(llama)
    run(engine, *requests)
    with_drafts_s = timed.now
    llama, timed = FakeLlama(n_ctx=2048, script=script), Timed(row=0.012)
    run(timed.engine(llama, 0), *requests)
    assert with_drafts_s <= timed.now * 1.02


def test_drafts_come_again_once_the_answer_copies() -> None:
    """Guesses are judged while none is verified; what came first was unlike the prompt."""
    letters = [65 + i * i * 7 % 26 for i in range(60)]
    text = bytes(letters).decode() + STORY
    llama = FakeLlama(n_ctx=1024, script=text)
    engine = Timed(row=0.006).engine(llama)
    run(engine, asked("a", COPY, SamplingParams(200, temperature=0)))
    assert accepted(engine) > len(STORY) / 3


def test_a_prompt_that_is_prefilled_keeps_the_step_to_itself() -> None:
    llama = FakeLlama(n_ctx=4096, script=STORY)
    engine = Timed(row=0.0).engine(llama, step_tokens=32)
    engine.add(asked("a", COPY, LONG))
    for _ in range(14):
        engine.step()
    assert accepted(engine) > 0
    before = len(llama.batches)
    engine.add(asked("b", "x" * 200, SamplingParams(1)))
    run(engine)
    prefilled = [batch for batch in llama.batches[before:] if ord("x") in batch.tokens]
    assert len(prefilled) == 7
    assert all(np.count_nonzero(batch.seq_ids == 0) == 0 for batch in prefilled)


def test_who_waits_for_another_step_waits_little_longer_for_drafts() -> None:
    """As when adapters take turns: an answer runs, but is not in this step."""
    scheduler = Scheduler(PrefixCache(1000, 4, 0), step_tokens=100, max_running=4)
    answers = {}
    for arrival, name in enumerate("ab"):
        request = Request(name, tuple(b"abc" * 9), LONG)
        tokens = [*request.prompt, *b"abcabc"]
        sequence = ScheduledSequence(NoOwner(), name, arrival, tokens, len(request.prompt), LONG.max_tokens)
        answers[name] = Generation(request, sequence, Sampler(LONG), TextStream(FakeTokenizer().token_bytes))
        scheduler.add(sequence)
    while (plan := scheduler.plan()) and not scheduler.spare(plan, 8):
        scheduler.commit(plan)
        for chunk in plan.chunks:
            chunk.sequence.tokens.append(b"abc"[len(chunk.sequence.tokens) % 3])
    assert plan is not None
    drafts = Drafts(15, 100)
    for n_rows in (1, 2, 4, 8):
        drafts.timed(replace(plan, chunks=plan.chunks[:1] * n_rows), 0.02 + 0.002 * n_rows)
    drafts.extend(plan, scheduler, answers)
    drafts.judge(answers["a"], plan.chunks[0], list(b"bca" * 5))
    turn = replace(plan, chunks=plan.chunks[:1])
    while_other_waits = drafts.extend(turn, scheduler, answers).n_tokens
    scheduler.drop(answers["b"].sequence)
    assert 1 < while_other_waits <= 4 < drafts.extend(turn, scheduler, answers).n_tokens


def test_an_answer_with_a_grammar_gets_no_drafts() -> None:
    llama = FakeLlama(script=STORY)
    timed = Timed(row=0.0)
    llama.on_decode = timed.passes
    engine = Engine(llama, EngineOptions(max_drafts=15), Grammars(FakeTokenizer()), clock=lambda: timed.now)
    grammar = Grammar("regex", "[a-z, ]*", "regex")
    events = run(engine, asked("a", COPY, SamplingParams(40, temperature=0, grammar=grammar)))
    assert text_of(events, "a") == STORY[:40]
    assert engine.stats().draft_tokens_total == 0


@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize(
    "error", [NoKvSlot("1"), DecodeAborted("2"), BatchInvalid("-1")], ids=lambda e: type(e).__name__
)
def test_a_decode_with_drafts_that_fails_is_tried_without(at: int, error: Exception) -> None:
    """Alone in its batch an answer would be to blame: the drafts are blamed first."""
    llama = FakeLlama(script=STORY, fail_at={at: error})
    engine = Timed().engine(llama)
    events = run(engine, asked("a", COPY, LONG))
    end = ends(events)["a"]
    had_drafts = len(llama.batches[at].tokens) > 1
    assert isinstance(end, Finished) or not had_drafts
    if isinstance(end, Finished):
        assert text_of(events, "a") == STORY
    if had_drafts:
        assert len(llama.batches[at + 1].tokens) == 1
    nothing_left(engine, llama)


def test_a_batch_that_refuses_drafts_is_served_without() -> None:
    def refuse(_: int, batch: Batch) -> None:
        if len(batch.tokens) > np.count_nonzero(np.bincount(batch.seq_ids)) and batch.wants_logits.all():
            raise BatchInvalid("-1")

    llama, timed = FakeLlama(n_ctx=2048, script=STORY), Timed()
    timed.also = refuse
    engine = timed.engine(llama)
    requests = [asked(str(i), COPY, LONG) for i in range(3)]
    events = run(engine, *requests)
    assert all(text_of(events, request.id) == STORY for request in requests)
    assert accepted(engine) == 0


def test_drafts_never_evict_a_prefix_that_others_may_share() -> None:
    llama = FakeLlama(n_ctx=164, script=STORY)
    engine = Timed(row=0.0).engine(llama)
    run(engine, asked("kept", "y" * 40, SamplingParams(1, temperature=0)))
    events = run(engine, asked("a", COPY[: len(COPY) - 4], SamplingParams(len(STORY) - 25, temperature=0)))
    assert isinstance(ends(events)["a"], Finished)
    again = ends(run(engine, asked("again", "y" * 40, SamplingParams(1, temperature=0))))["again"]
    assert isinstance(again, Finished)
    assert again.usage.cached_tokens == 39


@pytest.mark.parametrize("steps", range(1, 16, 2))
def test_cancel_between_steps_frees_every_cell(steps: int) -> None:
    llama = FakeLlama(n_ctx=2048, script=STORY)
    engine = Timed().engine(llama)
    engine.add(asked("gone", COPY, LONG))
    engine.add(asked("stays", COPY, LONG))
    events: list[Event] = []
    for _ in range(steps):
        events += engine.step()
    events += engine.cancel("gone")
    assert engine.stats().kv_cells_used == llama.used_cells
    events += run(engine)
    assert text_of(events, "stays") == STORY
    nothing_left(engine, llama)


def test_a_stage_that_breaks_among_the_drafts_keeps_what_was_written_before() -> None:
    llama = FakeLlama(n_ctx=2048, script=STORY)
    spell = llama.tokenizer.token_bytes

    def broken(token: int, *, special: bool = False) -> bytes:
        if token == ord("y"):
            raise RuntimeError("no such piece")
        return spell(token, special=special)

    llama.tokenizer.token_bytes = broken  # type: ignore[method-assign]
    engine = Timed().engine(llama)
    events = run(engine, asked("a", COPY, LONG))
    assert accepted(engine) > 0
    assert isinstance(ends(events)["a"], Failed)
    assert bytes(ids_of(events, "a")).decode() == STORY[: STORY.index("y")]
    nothing_left(engine, llama)


def test_drafts_of_one_do_not_change_when_a_preempted_answer_comes_back() -> None:
    params = SamplingParams(60, temperature=6, seed=5, ignore_eos=True)
    requests = [asked(str(i), COPY[11:50] + str(i), params) for i in range(3)]
    without = run(Engine(FakeLlama(n_ctx=2048, script=STORY)), *requests)
    llama = FakeLlama(n_ctx=160, script=STORY)
    engine = Timed(row=0.0).engine(llama)
    events = run(engine, *requests)
    assert engine.stats().preemptions_total > 0
    assert accepted(engine) > 0
    assert all(own(events, r.id)[:-1] == own(without, r.id)[:-1] for r in requests)
    nothing_left(engine, llama)


class DraftTraffic(Traffic):
    """The same traffic, with a model that mostly says again what it read, and drafts of every size."""

    @initialize(
        n_ctx=st.sampled_from([48, 64, 256]),
        step_tokens=st.integers(1, 40) | st.just(100),
        running=st.integers(1, 6),
        ids=st.integers(0, 6),
        row_s=st.sampled_from([0.0, 0.002, 0.01]),
        period=st.integers(3, 7),
    )
    def begin(self, n_ctx: int, step_tokens: int, running: int, ids: int, row_s: float, period: int) -> None:
        def script(history: tuple[int, ...]) -> int:
            if sum(history[-4:]) % 23 == 0:
                return EOS
            strays = sum(history[-3:]) % 11 == 0
            return history[-1 if strays else -min(period, len(history))]

        super().begin(n_ctx, step_tokens, running, ids)
        self.llama.script = script
        self.engine = Timed(row=row_s).engine(self.llama, 8, step_tokens=step_tokens, max_running=running)


TestDraftTraffic = DraftTraffic.TestCase
TestDraftTraffic.settings = settings(max_examples=80, stateful_step_count=25)
