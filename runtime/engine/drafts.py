"""Drafts in the engine: looked-up tokens that are verified in the step that decodes their answer's next token.

A decode row becomes [last token, draft …] with a row of logits after each. The rows are drawn from in order by the
answer's own sampler; the first token that differs from its draft is kept and the drafts behind it are forgotten. So
every token is drawn from the very row, with the very random number, that it would be drawn with alone.

Drafts take only what a step that does nothing but decode has left over. While an answer gets none, the look-up is
still compared with what was drawn, which costs nothing and tells when drafts would pay.
"""

from collections.abc import Mapping
from dataclasses import replace

from runtime.decoding.prompt_lookup import (
    ENGINE_MEMORY,
    NO_CANDIDATE,
    Acceptance,
    DraftCandidate,
    Drafter,
    StepTimes,
    draft_lengths,
)
from runtime.scheduling.plan import Chunk, StepPlan
from runtime.scheduling.scheduler import Scheduler

from .answer import Generation

# Drafts of one answer in one step, unless a setting says otherwise. More hardly pay, however sure they are.
MAX_DRAFTS = 15
# An answer is looked up once it has so many tokens: a label never pays for the index of its prompt.
FIRST_LOOK = 4
# Steps without drafts after a decode with drafts failed.
REST_STEPS = 64


class Drafts:
    """Who gets drafts, and what became of them. `limit` bounds those of one answer in one step (0: none)."""

    def __init__(self, limit: int | None) -> None:
        self._limit = MAX_DRAFTS if limit is None else limit
        self._times = StepTimes()
        self._everyone = Acceptance(ENGINE_MEMORY)
        self._rest = 0
        self.n_drafted = 0
        self.n_accepted = 0

    def extend(self, plan: StepPlan, scheduler: Scheduler, answers: Mapping[str, Generation]) -> StepPlan:
        """The scheduler's plan with drafts, as its step has room; the same plan if it has none or none would pay."""
        if not self._limit:
            return plan
        self._rest = max(self._rest - 1, 0)
        spare = scheduler.spare(plan)
        if spare < 1 or self._rest:
            return plan
        drafters = [self._look(answers.get(chunk.sequence.request.id)) for chunk in plan.chunks]
        candidates = [
            DraftCandidate(drafter.rate, len(drafter.guess)) if drafter else NO_CANDIDATE for drafter in drafters
        ]
        time = self._times.fit()
        if time is None or not any(candidate.count for candidate in candidates):
            return plan
        others_wait = len(scheduler.running) > len(plan.chunks)
        lengths = draft_lengths(candidates, spare, time, others_wait=others_wait)
        chunks = [
            _with_drafts(chunk, drafter.guess[:length]) if drafter and length else chunk
            for chunk, drafter, length in zip(plan.chunks, drafters, lengths, strict=True)
        ]
        return replace(plan, chunks=tuple(chunks))

    def timed(self, plan: StepPlan, seconds: float) -> None:
        """The plan's decode took so long."""
        if self._limit and all(chunk.count == chunk.n_rows for chunk in plan.chunks):
            self._times.note(plan.n_tokens, seconds)

    def withdraw(self, plan: StepPlan) -> bool:
        """The plan's decode failed: if it had drafts, none are made for a while, so that it can be tried without."""
        had = any(chunk.drafts for chunk in plan.chunks)
        if had:
            self._rest = REST_STEPS
        return had

    def judge(self, answer: Generation, chunk: Chunk, drawn: list[int]) -> None:
        """`drawn` are the tokens that were drawn after the chunk: one, and one for each draft that was right."""
        self.n_drafted += len(chunk.drafts)
        self.n_accepted += sum(a == b for a, b in zip(chunk.drafts, drawn, strict=False))
        if answer.drafter is not None:
            answer.drafter.judge(drawn)

    def _look(self, answer: Generation | None) -> Drafter | None:
        """The drafter of an answer that can have drafts, with its guess. One with a grammar cannot: it has its own."""
        if answer is None or answer.guide is not None or answer.sequence.n_generated < FIRST_LOOK:
            return None
        if answer.drafter is None:
            answer.drafter = Drafter(self._everyone)
        room = answer.sequence.request.params.max_tokens - answer.sequence.n_generated - 1
        answer.drafter.look(answer.sequence.tokens, min(self._limit, room))
        return answer.drafter


def _with_drafts(chunk: Chunk, drafts: tuple[int, ...]) -> Chunk:
    n_rows = 1 + len(drafts)
    return replace(chunk, count=n_rows, n_rows=n_rows, drafts=drafts)
