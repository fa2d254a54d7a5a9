"""Prompt lookup on the real model: drafts change how many steps an answer takes, not what it says."""

from collections.abc import Callable
from itertools import count

import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.model import Llama
from runtime.requests import Event, Request, SamplingParams

from .test_engine import agree, ask, ids, run, written

pytestmark = pytest.mark.model

NOTE = "Bring 14 blue pens, 3 staplers and the old cache (shelf Q7) to Ms. Okonkwo by Friday."
COPY = f"Note: {NOTE}\nNote again: {NOTE}\nNote again: {NOTE}\nNote again: Bring 14 blue pens, 3"
GREEDY = SamplingParams(16, temperature=0, logprobs=2, ignore_eos=True)


def answered(llama: Llama, max_drafts: int, *requests: Request) -> tuple[list[Event], Engine]:
    """The answers from an empty cache. Every step takes as long as any other, so that drafts always pay."""
    llama.clear()
    ticks: Callable[[], float] = count().__next__
    engine = Engine(llama, EngineOptions(max_running=4, max_drafts=max_drafts, fast=True), clock=ticks)
    return run(engine, *requests), engine


def test_a_copy_takes_fewer_steps_and_says_the_same(base: Llama) -> None:
    asked = ask(base, "copy", COPY, GREEDY)
    without, plain = answered(base, 0, asked)
    events, engine = answered(base, 15, asked)
    assert agree(written(without, "copy"), written(events, "copy"))
    assert base.tokenizer.decode(ids(events, "copy")).startswith(" staplers and the old cache")
    stats = engine.stats()
    assert stats.steps_total < plain.stats().steps_total - 6
    assert stats.draft_tokens_accepted_total > 6


def test_drafts_in_company_change_nobodys_answer(base: Llama) -> None:
    asked = [
        ask(base, "copy", COPY, GREEDY),
        ask(base, "free", "The best thing about the sea is", GREEDY),
        ask(base, "list", "1, 2, 3, 4, 5,", GREEDY),
    ]
    without, _ = answered(base, 0, *asked)
    events, engine = answered(base, 15, *asked)
    assert engine.stats().draft_tokens_accepted_total > 0
    for request in asked:
        assert agree(written(without, request.id), written(events, request.id))


def test_rejected_drafts_leave_no_trace_in_the_cache(base: Llama) -> None:
    """The prompt goes on otherwise than the model: what is drawn after a rejection must not see the draft."""
    params = SamplingParams(24, temperature=0, logprobs=2, ignore_eos=True)
    asked = ask(base, "x", "a b c d e f g. a b c d X a b c d e Y a b c d e f Z a b c d", params)
    without, _ = answered(base, 0, asked)
    events, engine = answered(base, 15, asked)
    stats = engine.stats()
    assert stats.draft_tokens_total > stats.draft_tokens_accepted_total
    assert agree(written(without, "x"), written(events, "x"))


def test_a_seed_draws_the_same_with_drafts(base: Llama) -> None:
    """Other shapes move the logits a little: the draws agree until one falls between two tokens."""
    asked = ask(base, "seeded", COPY, SamplingParams(16, temperature=0.5, seed=42, ignore_eos=True))
    without, _ = answered(base, 0, asked)
    events, engine = answered(base, 15, asked)
    assert engine.stats().draft_tokens_accepted_total > 0
    assert ids(events, "seeded")[:8] == ids(without, "seeded")[:8]
