"""Speculative decoding by prompt lookup: looked-up tokens (drafts) verified in the step that decodes the next token.

A decode row becomes [last token, draft …] with a row of logits after each. The answer's own sampler goes through the
rows in order; the first token that differs from its draft is kept, and the drafts behind it are taken back. So every
token is sampled from the same row, with the same random number, as without drafts.

    tokens     … the  rain  in  the │ rain  in        drafts: 2
    rows                         ▲     ▲    ▲
    sampled                    rain    in  Spain      both right: three tokens from one decode

All of them are computed as rows of answers are. Where the same answer must come without drafts, a step has no more rows
than the model computes alike (`ModelInfo.rows_alike`).

Drafts take only the room that a step leaves over, and only if it does nothing but decode. While an answer gets none,
its look-up is still compared with the sampled tokens, which costs nothing and shows when drafts would pay.
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

from .generation import Generation

# Drafts of one answer in one step, unless a setting bounds them. More rarely pay, however likely they are.
MAX_DRAFTS = 15
# Tokens of an answer before its first look-up: a label never pays for the index of its prompt.
FIRST_LOOK = 4
# Steps without drafts after a decode with drafts failed.
REST_STEPS = 64


class Drafts:
    """Adds speculative tokens to a plan and learns how many are accepted."""

    def __init__(self, limit: int | None, max_rows: int) -> None:
        """`limit` bounds the drafts of one answer in one step (None: MAX_DRAFTS), `max_rows` a step with drafts."""
        self._limit = MAX_DRAFTS if limit is None else limit
        self._max_rows = max_rows
        self._times = StepTimes()
        self._all_answers = Acceptance(ENGINE_MEMORY)
        self._rest = 0
        self.n_drafted = 0
        self.n_accepted = 0

    def extend(self, plan: StepPlan, scheduler: Scheduler, live: Mapping[str, Generation]) -> StepPlan:
        """The plan with drafts for the `live` answers in it; the same plan if it has no room or drafts would not pay.

        A sequence gets none if its request is not `live`.
        """
        self._rest = max(self._rest - 1, 0)
        spare = scheduler.spare(plan, self._max_rows)
        if spare < 1 or self._rest:
            return plan
        drafters = [self._look_up(live.get(chunk.sequence.request_id)) for chunk in plan.chunks]
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
        """Learn that the plan's decode took `seconds`."""
        if all(chunk.count == chunk.n_rows for chunk in plan.chunks):
            self._times.note(plan.n_tokens, seconds)

    def withdraw(self, plan: StepPlan) -> bool:
        """Make no drafts for a while after a failed decode; True if it had drafts, so it can be retried without."""
        had = any(chunk.drafts for chunk in plan.chunks)
        if had:
            self._rest = REST_STEPS
        return had

    def judge(self, generation: Generation, chunk: Chunk, sampled: list[int]) -> None:
        """Learn from the tokens `sampled` after the chunk: one, and one for each draft that was right."""
        self.n_drafted += len(chunk.drafts)
        self.n_accepted += sum(a == b for a, b in zip(chunk.drafts, sampled, strict=False))
        if generation.drafter is not None:
            generation.drafter.judge(sampled)

    def _look_up(self, generation: Generation | None) -> Drafter | None:
        """The drafter of an answer that can have drafts, with its guess. A grammar forces its tokens without any."""
        if generation is None or generation.grammar is not None or generation.sequence.n_generated < FIRST_LOOK:
            return None
        if generation.drafter is None:
            generation.drafter = Drafter(self._all_answers)
        sequence = generation.sequence
        room = sequence.max_tokens - sequence.n_generated - 1
        generation.drafter.look_up(sequence.tokens, min(self._limit, room))
        return generation.drafter


def _with_drafts(chunk: Chunk, drafts: tuple[int, ...]) -> Chunk:
    n_rows = 1 + len(drafts)
    return replace(chunk, count=n_rows, n_rows=n_rows, drafts=drafts)
