"""The nouns of scheduling: sequences, chunks of their tokens, edits of the KV cache, and the plan of a step.

A request for text is one sequence; a request that scores choices is one for each prompt, and one for each branch of its
choices. The scheduler knows sequences only, and nothing of their owners.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.requests import Event


class Owner(Protocol):
    """The job that a sequence is computed for."""

    def advance(self, chunk: "Chunk", logits: np.ndarray) -> Iterable[Event]:
        """Take in the logits after the last `n_rows` tokens of `chunk`, float32 of shape (n_rows, n_vocab).

        An exception fails the sequence's request, after the events that came before it.
        """

    def drop(self, request_id: str) -> None:
        """Forget a live request and all of its sequences."""


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """Tokens that grow in the KV cache, from `Scheduler.add` to `finish` or `drop`.

    `arrival` numbers sequences in the order they came: the lower goes first. `tokens` is the prompt, `n_prompt` long,
    and what followed it, at most `max_tokens`. The first `n_computed` of them are in the KV cache under `seq_id` (None
    while it waits, or is pre-empted), computed under LoRA `adapter` (None: the bare model). `n_cached` of the prompt's
    tokens were in the cache already when it joined. `n_ahead` tokens after the prompt were forced by a grammar before
    any was sampled. Logits are wanted after token `first_row` and every later one (None: after the last token only,
    which is all that writing needs). The first `n_whole` tokens were computed in whole chunks (see `Scheduler`).
    """

    owner: Owner
    request_id: str
    arrival: int
    tokens: list[int]
    n_prompt: int
    max_tokens: int
    adapter: str | None = None
    seq_id: int | None = None
    n_computed: int = 0
    n_cached: int = 0
    n_ahead: int = 0
    first_row: int | None = None
    n_whole: int = 0

    @property
    def n_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.n_prompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start … start+count-1` of `sequence`, to be computed, with the logits of the last `n_rows` of them.

    The last `len(drafts)` of them are speculative tokens: not part of the sequence yet, verified in this step.
    """

    sequence: ScheduledSequence
    start: int
    count: int
    n_rows: int
    drafts: tuple[int, ...] = ()

    @property
    def seq_id(self) -> int:
        """The id of its sequence, which has one while it is planned."""
        assert self.sequence.seq_id is not None
        return self.sequence.seq_id

    @property
    def samples(self) -> bool:
        """True if the step gives logits for it."""
        return self.n_rows > 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt: `length` tokens, held by sequence id `source` or in a `snapshot`.

    Both are None if nothing matches.
    """

    source: int | None
    length: int
    snapshot: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Share the first `length` cells of `source` with `target` (both sequence ids)."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Take `seq_id` out of the cells at positions `start` and up; cells that no sequence holds any more become free."""

    seq_id: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """Take a snapshot, number `snapshot`, of the `length` tokens that `seq_id` holds."""

    seq_id: int
    snapshot: int
    length: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Give `seq_id`, an empty sequence, cells of its own with the first `length` tokens of a snapshot."""

    snapshot: int
    seq_id: int
    length: int


Edit = Copy | Remove | Save | Restore


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: edit the KV cache, in this order, then compute these chunks in one decode under `adapter`."""

    edits: tuple[Edit, ...]
    chunks: tuple[Chunk, ...]
    adapter: str | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens in the decode."""
        return sum(chunk.count for chunk in self.chunks)
