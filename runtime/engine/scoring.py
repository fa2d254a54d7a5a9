"""Scoring requests inside the engine: each question's prompt is prefilled once, its choices fork off it as branches.

A question begins as one sequence, its prompt. Once that is computed it goes on as the first branch, and the others join
as sequences of their own, which share the prompt's cells like any request with that prefix. The scheduler sees nothing
but sequences. A call's questions run a few at a time and queue behind whoever came meanwhile, so that a call of
hundreds holds up nobody.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.decoding.choice_tree import Branch, ChoiceTree
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.requests import MAX_SCORED_CHOICES, Event, Request, SamplingParams, Scored, Scoring, ScoringPrompt, Usage
from runtime.scheduling.plan import ScheduledSequence
from runtime.scheduling.scheduler import Scheduler

# Arrival numbers of one question: its prompt's, and one for each choice that may fork off.
ARRIVALS = MAX_SCORED_CHOICES + 1


@dataclass(eq=False, slots=True)
class _Call:
    scoring: Scoring
    answers: list[tuple[float, ...] | None]
    n_begun: int = 0
    n_cached: int = 0
    n_computed: int = 0
    live: list[ScheduledSequence] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _ScoringJob:
    """One question while it is worked on. `live` are its sequences; `root` is the one that computes the prompt."""

    call: _Call
    place: int
    ballot: ChoiceTree
    root: ScheduledSequence
    arrivals: int
    live: list[ScheduledSequence]


class Scorer:
    """The engine's scoring requests, at most `at_once` questions of each in work."""

    def __init__(self, scheduler: Scheduler, next_arrival: Callable[[], int], at_once: int) -> None:
        """`next_arrival` gives the first of `ARRIVALS` unused numbers."""
        self._scheduler = scheduler
        self._next_arrival = next_arrival
        self._at_once = at_once
        self._calls: dict[str, _Call] = {}
        self._polls: dict[int, _ScoringJob] = {}
        self.n_prompt = 0
        self.n_cached = 0

    @property
    def live(self) -> tuple[str, ...]:
        """The ids of the requests whose terminal event is still to come."""
        return tuple(self._calls)

    def add(self, scoring: Scoring) -> None:
        """Begin with a request that was checked."""
        call = _Call(scoring, [None] * len(scoring.questions))
        self._calls[scoring.id] = call
        for _ in range(min(self._at_once, len(scoring.questions))):
            self._begin(call)

    def drop(self, request_id: str) -> None:
        """Forget a live request and free its cells."""
        for sequence in self._calls.pop(request_id).live:
            del self._polls[sequence.arrival]
            self._scheduler.drop(sequence)

    def clear(self) -> None:
        """Forget all requests; the scheduler is not used any more."""
        self._calls.clear()
        self._polls.clear()

    def advance(self, sequence: ScheduledSequence, rows: np.ndarray) -> list[Event]:
        """`rows` are the logits after the last tokens that were computed of `sequence`."""
        poll = self._polls.get(sequence.arrival)
        if poll is None:  # another branch of it broke in this very step
            return []
        prompt = poll.ballot.question.prompt
        for end, row in enumerate(rows, sequence.n_computed - len(rows) + 1):
            poll.ballot.read(tuple(sequence.tokens[len(prompt) : end]), row)
        if sequence.n_computed < len(sequence.tokens):
            return []
        if sequence is poll.root and len(sequence.tokens) == len(prompt):
            self._grow(poll)
        else:
            self._end(poll, sequence)
        return [] if poll.live else self._answer(poll)

    def _begin(self, call: _Call) -> None:
        question = call.scoring.questions[call.n_begun]
        root = _sequence(call, question, self._next_arrival(), question.prompt, len(question.prompt) - 1)
        poll = _ScoringJob(call, call.n_begun, ChoiceTree(question), root, root.arrival + 1, [])
        call.n_begun += 1
        self._start(poll, root)

    def _start(self, poll: _ScoringJob, sequence: ScheduledSequence) -> None:
        poll.live.append(sequence)
        poll.call.live.append(sequence)
        self._polls[sequence.arrival] = poll
        self._scheduler.add(sequence)

    def _end(self, poll: _ScoringJob, sequence: ScheduledSequence) -> None:
        poll.live.remove(sequence)
        poll.call.live.remove(sequence)
        del self._polls[sequence.arrival]
        if sequence is poll.root:
            self._scheduler.finish(sequence)
        else:  # nothing of it is worth keeping but what the root holds as well
            self._scheduler.drop(sequence)
        if not poll.live:
            self._fork(poll, poll.ballot.next_wave())

    def _grow(self, poll: _ScoringJob) -> None:
        """The prompt is computed, and so where each choice stands after its first token. That may tell them all."""
        root, prompt = poll.root, poll.ballot.question.prompt
        wave = poll.ballot.next_wave()
        if not wave:
            self._end(poll, root)
            return
        first, *others = wave
        root.tokens.extend(first.path)
        root.first_row = len(prompt) - 1 + first.first
        poll.call.n_computed += len(first.path)
        self._fork(poll, others)

    def _fork(self, poll: _ScoringJob, branches: tuple[Branch, ...] | list[Branch]) -> None:
        prompt = poll.ballot.question.prompt
        for branch in branches:
            first_row = len(prompt) - 1 + branch.first
            tokens = prompt + branch.path
            self._start(poll, _sequence(poll.call, poll.ballot.question, poll.arrivals, tokens, first_row))
            poll.arrivals += 1
            poll.call.n_computed += len(branch.path)

    def _answer(self, poll: _ScoringJob) -> list[Event]:
        call = poll.call
        call.answers[poll.place] = poll.ballot.logprobs()
        call.n_cached += poll.root.n_cached
        self.n_prompt += len(poll.ballot.question.prompt)
        self.n_cached += poll.root.n_cached
        if call.n_begun < len(call.answers):
            self._begin(call)
        answers = tuple(answer for answer in call.answers if answer is not None)
        if len(answers) < len(call.answers):
            return []
        del self._calls[call.scoring.id]
        n_prompt = sum(len(question.prompt) for question in call.scoring.questions)
        return [Scored(call.scoring.id, answers, Usage(n_prompt, call.n_cached, call.n_computed))]


def _sequence(
    call: _Call, question: ScoringPrompt, arrival: int, tokens: tuple[int, ...], first_row: int
) -> ScheduledSequence:
    params = SamplingParams(max_tokens=max(map(len, question.choices)))
    request = Request(call.scoring.id, question.prompt, params, call.scoring.adapter)
    return ScheduledSequence(request, arrival, list(tokens), first_row=first_row)


def check_scoring(scoring: Scoring, n_vocab: int, n_ctx: int) -> None:
    """Raise InvalidRequest or ContextTooLong for what the edge should have refused."""
    if not scoring.questions:
        raise InvalidRequest("there is nothing to decide: no questions", param="questions")
    for question in scoring.questions:
        choices = question.choices
        if not question.prompt:
            raise InvalidRequest("the prompt has no tokens", param="input")
        if not 1 <= len(choices) <= MAX_SCORED_CHOICES or len(set(choices)) < len(choices) or () in choices:
            message = (
                f"a question needs 1 … {MAX_SCORED_CHOICES} choices, all different and none empty, got {len(choices)}"
            )
            raise InvalidRequest(message, param="questions")
        for token in {*question.prompt, *question.ends, *(token for choice in choices for token in choice)}:
            if not 0 <= token < n_vocab:
                raise InvalidRequest(f"token id {token} is not in the vocabulary of {n_vocab}", param="questions")
        longest = max(map(len, choices))
        if len(question.prompt) + longest > n_ctx:
            message = f"{len(question.prompt)} prompt tokens and a choice of {longest} exceed the context of {n_ctx}"
            raise ContextTooLong(message, param="questions")
