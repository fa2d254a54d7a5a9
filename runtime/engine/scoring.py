"""The job that scores choices: each prompt is prefilled once, and its choices fork off it as branches.

                       ┌─ branch: further tokens of some choices ─► rows
    prompt ─► last row ┼─ branch …
                       └─ (the prompt's own sequence computes the first branch)

A prompt begins as one sequence. Once that is computed it continues as the first branch, and the others join as
sequences of their own, which copy the prompt's cells like any request with that prefix: the scheduler sees nothing but
sequences. `ChoiceTree` decides which branches to compute, and reads the choices' probabilities from their logits. A
request's prompts run a few at a time and queue behind requests that came meanwhile, so a request of hundreds delays no
other for long.

A written answer that is a label comes here with the tree half read: only what its own rows leave open is computed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from msgspec import structs

from runtime.decoding.choice_tree import Branch, ChoiceTree
from runtime.errors import ContextTooLong, InvalidRequest
from runtime.llama.interface import ModelInfo
from runtime.requests import MAX_SCORED_CHOICES, Event, Finished, Scored, Scoring, ScoringPrompt, Usage
from runtime.scheduling.plan import Chunk, ScheduledSequence
from runtime.scheduling.scheduler import Scheduler

from .options import TokenCounts


@dataclass(eq=False, slots=True)
class _LiveScoring:
    """A live request: the log-probabilities of each prompt's choices, once known, and its sequences in work.

    `written` is the terminal event of an answer that only waits for the log-probabilities of its labels.
    """

    scoring: Scoring
    logprobs: list[tuple[float, ...] | None]
    n_begun: int = 0
    n_cached: int = 0
    n_computed: int = 0
    sequences: list[ScheduledSequence] = field(default_factory=list)
    written: Finished | None = None


@dataclass(eq=False, slots=True)
class _ScoringJob:
    """One prompt in work, the `place`-th of its request. Its `root` computes the prompt, and then the first branch.

    There is no root where the prompt's row is known.
    """

    live: _LiveScoring
    place: int
    tree: ChoiceTree
    root: ScheduledSequence | None
    next_arrival: int
    sequences: list[ScheduledSequence]

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tree.prompt.prompt


class Scorer:
    """The job of all `Scoring`s, and the owner of their sequences; at most `at_once` prompts of each are in work."""

    def __init__(
        self, info: ModelInfo, scheduler: Scheduler, arrivals: Iterator[int], counts: TokenCounts, at_once: int
    ) -> None:
        """`arrivals` gives the first of `ARRIVALS` unused numbers."""
        self._info = info
        self._scheduler = scheduler
        self._arrivals = arrivals
        self._counts = counts
        self._at_once = at_once
        self._jobs: dict[int, _ScoringJob] = {}  # by the arrival of each of its sequences
        self.live: dict[str, _LiveScoring] = {}

    def check(self, scoring: Scoring) -> None:
        """Raise InvalidRequest or ContextTooLong for a request that the edge should have refused."""
        if not scoring.questions:
            raise InvalidRequest("there is nothing to decide: no questions", param="questions")
        for prompt in scoring.questions:
            self.check_prompt(prompt)

    def check_prompt(self, prompt: ScoringPrompt) -> None:
        """Raise InvalidRequest or ContextTooLong for a prompt or choices that cannot be scored."""
        _check_prompt(prompt, self._info)

    def add(self, scoring: Scoring) -> None:
        """Begin a request that was checked."""
        live = _LiveScoring(scoring, [None] * len(scoring.questions))
        self.live[scoring.id] = live
        for _ in range(min(self._at_once, len(scoring.questions))):
            self._begin(live)

    def complete(self, written: Finished, tree: ChoiceTree, answer: ScheduledSequence) -> None:
        """Compute what `tree` lacks; its log-probabilities go out with `written`, the end of `answer`.

        The branches take the answer's place in the queue.
        """
        live = _LiveScoring(Scoring(written.request_id, (tree.prompt,), answer.adapter), [None], written=written)
        self.live[written.request_id] = live
        if tree.wants(()):  # a grammar forced the answer's first token
            self._begin(live)
            return
        live.n_begun = 1
        self._fork(_ScoringJob(live, 0, tree, None, answer.arrival + 1, []), tree.next_wave())

    def drop(self, request_id: str) -> None:
        """Forget a live request; its cells are free with the next edits."""
        for sequence in self.live.pop(request_id).sequences:
            del self._jobs[sequence.arrival]
            self._scheduler.drop(sequence)

    def clear(self) -> None:
        """Forget all requests of an engine that is dead."""
        self.live.clear()
        self._jobs.clear()

    def advance(self, chunk: Chunk, logits: np.ndarray) -> list[Event]:
        """Read the logits into the prompt's tree; fork branches, or end the request, when the sequence is complete."""
        sequence = chunk.sequence
        job = self._jobs.get(sequence.arrival)
        if job is None:  # another branch of the request failed in this very step
            return []
        n_prompt = len(job.prompt)
        for end, row in enumerate(logits, sequence.n_computed - len(logits) + 1):
            job.tree.read(tuple(sequence.tokens[n_prompt:end]), row)
        if sequence.n_computed < len(sequence.tokens):
            return []
        if sequence is job.root and len(sequence.tokens) == n_prompt:
            self._branch(job)
        else:
            self._end(job, sequence)
        return [] if job.sequences else self._complete(job)

    def _begin(self, live: _LiveScoring) -> None:
        prompt = live.scoring.questions[live.n_begun]
        root = self._sequence(live, prompt, next(self._arrivals), prompt.prompt, len(prompt.prompt) - 1)
        job = _ScoringJob(live, live.n_begun, ChoiceTree(prompt), root, root.arrival + 1, [])
        live.n_begun += 1
        self._start(job, root)

    def _start(self, job: _ScoringJob, sequence: ScheduledSequence) -> None:
        job.sequences.append(sequence)
        job.live.sequences.append(sequence)
        self._jobs[sequence.arrival] = job
        self._scheduler.add(sequence)

    def _end(self, job: _ScoringJob, sequence: ScheduledSequence) -> None:
        job.sequences.remove(sequence)
        job.live.sequences.remove(sequence)
        del self._jobs[sequence.arrival]
        if sequence is job.root:
            self._scheduler.finish(sequence)
        else:  # all of it that is worth keeping, the root holds as well
            self._scheduler.drop(sequence)
        if not job.sequences:
            self._fork(job, job.tree.next_wave())

    def _branch(self, job: _ScoringJob) -> None:
        """Start the first wave of branches, now that the prompt is computed; end the root if none is needed."""
        wave, root = job.tree.next_wave(), job.root
        assert root is not None, "it has computed the prompt"
        if not wave:
            self._end(job, root)
            return
        first, *others = wave
        root.tokens.extend(first.path)
        root.first_row = len(job.prompt) - 1 + first.first
        job.live.n_computed += len(first.path)
        self._fork(job, others)

    def _fork(self, job: _ScoringJob, branches: Iterable[Branch]) -> None:
        for branch in branches:
            first_row = len(job.prompt) - 1 + branch.first
            tokens = job.prompt + branch.path
            self._start(job, self._sequence(job.live, job.tree.prompt, job.next_arrival, tokens, first_row))
            job.next_arrival += 1
            job.live.n_computed += len(branch.path)

    def _sequence(
        self, live: _LiveScoring, prompt: ScoringPrompt, arrival: int, tokens: tuple[int, ...], first_row: int
    ) -> ScheduledSequence:
        return ScheduledSequence(
            owner=self,
            request_id=live.scoring.id,
            arrival=arrival,
            tokens=list(tokens),
            n_prompt=len(prompt.prompt),
            max_tokens=max(map(len, prompt.choices)),
            n_base=len(prompt.prompt),
            adapter=live.scoring.adapter,
            first_row=first_row,
        )

    def _complete(self, job: _ScoringJob) -> list[Event]:
        """Note the prompt's result and begin the request's next prompt; the terminal event after the last."""
        live = job.live
        live.logprobs[job.place] = job.tree.logprobs()
        if live.written is not None:
            del self.live[live.scoring.id]
            return [structs.replace(live.written, label_logprobs=job.tree.logprobs())]
        assert job.root is not None, "a request for scores has its prompt computed"
        live.n_cached += job.root.n_cached
        self._counts.prompt += len(job.prompt)
        self._counts.cached += job.root.n_cached
        if live.n_begun < len(live.logprobs):
            self._begin(live)
        known = tuple(logprobs for logprobs in live.logprobs if logprobs is not None)
        if len(known) < len(live.logprobs):
            return []
        del self.live[live.scoring.id]
        n_prompt = sum(len(prompt.prompt) for prompt in live.scoring.questions)
        return [Scored(live.scoring.id, known, Usage(n_prompt, live.n_cached, live.n_computed))]


def _check_prompt(prompt: ScoringPrompt, info: ModelInfo) -> None:
    choices = prompt.choices
    if not prompt.prompt:
        raise InvalidRequest("the prompt has no tokens", param="input")
    if not 1 <= len(choices) <= MAX_SCORED_CHOICES or len(set(choices)) < len(choices) or () in choices:
        message = f"a question needs 1 … {MAX_SCORED_CHOICES} choices, all different and none empty, got {len(choices)}"
        raise InvalidRequest(message, param="questions")
    for token in {*prompt.prompt, *prompt.ends, *(token for choice in choices for token in choice)}:
        if not 0 <= token < info.n_vocab:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {info.n_vocab}", param="questions")
    longest = max(map(len, choices))
    if len(prompt.prompt) + longest > info.n_ctx:
        message = f"{len(prompt.prompt)} prompt tokens and a choice of {longest} exceed the context of {info.n_ctx}"
        raise ContextTooLong(message, param="questions")
