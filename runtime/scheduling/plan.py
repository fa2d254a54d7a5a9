"""The nouns of scheduling: sequences, chunks of their tokens, the plan of a step, and turns.

A request for text is one sequence; a request that scores choices is one for each prompt, and one for each branch of its
choices. The scheduler knows sequences only, and nothing of their owners.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np

from runtime.kv_cache.prefix_cache import Edit
from runtime.requests import Event

# Cells kept free for each running answer when another joins, so that it is not pre-empted a moment later.
HEADROOM_TOKENS = 16
# Chunks of at most so many tokens are computed together. A longer one keeps the processor busy alone.
SHORT_TOKENS = 16
# An adapter's turn lasts until this many tokens were computed, a step counting as `STEP_TOKENS` at least: four steps of
# a few rows, two of sixteen, one that prefills. A change of adapter makes llama.cpp reserve its buffers again (4-5 ms,
# Gemma 3 270M, Q4_K_M, on 2 idle Xeon cores, a third of a step of one row; 7-9 ms in all before one of sixteen, a sixth
# of it), and the answers under other adapters wait for as long as a turn lasts.
TURN_TOKENS = 32
STEP_TOKENS = 8


class StepKind(IntEnum):
    """Kinds of steps, in the order in which they take turns."""

    LONG = 0
    SHORT = 1
    ROWS = 2


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
    which is all that writing needs).

    The first `n_base` tokens are computed as a prompt is, in chunks of two tokens or more; what follows them in the
    chunks in which it came, each of which ends at one of `cuts`, so that it is computed again in the same ones.
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
    n_base: int = 0
    cuts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n_base = self.n_base or len(self.tokens)

    @property
    def n_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.n_prompt

    @property
    def is_prompt(self) -> bool:
        """True while the next token is computed as a prompt's."""
        return self.n_computed < self.n_base

    @property
    def n_wanted(self) -> int:
        """The tokens of its next chunk, were there no bounds: one never goes from the prompt into the answer."""
        if self.is_prompt:
            return self.n_base - self.n_computed
        return next((cut for cut in self.cuts if cut > self.n_computed), len(self.tokens)) - self.n_computed

    def leaving_two(self, wanted: int, most: int) -> int:
        """At most `most` of a prompt's next `wanted` tokens: two or more, that leave none or two; else 0."""
        size, left = min(wanted, most), self.n_base - self.n_computed
        if left - size == 1 and left > 1:
            size = size - 1 if size > 2 else left if left <= most else 0
        return size if size > 1 or size == left else 0

    @property
    def kind(self) -> StepKind:
        """The kind of step that its next chunk belongs to."""
        return (
            StepKind.ROWS if self.n_wanted == 1 else StepKind.SHORT if self.n_wanted <= SHORT_TOKENS else StepKind.LONG
        )

    @property
    def n_outstanding(self) -> int:
        """Cells that it will soon need: the rest of its prompt and a bit of its answer."""
        answer = self.max_tokens - self.n_generated
        return len(self.tokens) - self.n_computed + min(answer, HEADROOM_TOKENS)

    @property
    def row_from(self) -> int:
        """Place of the first token that needs logits. A cached token gives none, so a match must end before it."""
        return len(self.tokens) - 1 if self.first_row is None else self.first_row


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start … start+count-1` of `sequence`, to be computed, with the logits of the last `n_rows` of them.

    The last `len(drafts)` of them are speculative tokens: not part of the sequence yet, verified in this step. `n_pad`
    tokens of no meaning follow, which are taken back: a step's chunks have the same number of tokens with them.
    """

    sequence: ScheduledSequence
    start: int
    count: int
    n_rows: int
    drafts: tuple[int, ...] = ()
    n_pad: int = 0

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
class StepPlan:
    """One step: edit the KV cache, in this order, then compute these chunks in one decode under `adapter`."""

    edits: tuple[Edit, ...]
    chunks: tuple[Chunk, ...]
    adapter: str | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens in the decode, but for those of no meaning."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(slots=True)
class _AdapterGroup:
    """The live sequences under one adapter: their number, the tokens of its turn so far, and its last step's kind."""

    live: int = 0
    spent: int = 0
    kind: StepKind = StepKind.ROWS


class AdapterRotation:
    """Round robin over LoRA adapters (None: the bare model): one adapter is active per step.

    Only adapters with live sequences take part; the first in `order` has the turn.
    """

    def __init__(self) -> None:
        self._groups: dict[str | None, _AdapterGroup] = {}

    @property
    def order(self) -> tuple[str | None, ...]:
        """Every adapter with a live sequence, in the order in which they may compute."""
        return tuple(self._groups)

    def join(self, adapter: str | None) -> None:
        """Count one more sequence under `adapter`."""
        self._groups.setdefault(adapter, _AdapterGroup()).live += 1

    def leave(self, adapter: str | None) -> None:
        """Count one sequence less under `adapter`."""
        self._groups[adapter].live -= 1
        if self._groups[adapter].live == 0:
            del self._groups[adapter]

    def kind(self, adapter: str | None) -> StepKind:
        """The kind of the last step under `adapter`."""
        return self._groups[adapter].kind

    def computed(self, adapter: str | None, n_tokens: int, kind: StepKind) -> None:
        """Charge a step of `n_tokens` to `adapter`'s turn."""
        group = self._groups[adapter]
        group.kind = kind
        group.spent += max(n_tokens, STEP_TOKENS)
        if group.spent >= TURN_TOKENS:
            group.spent = 0
            self._groups[adapter] = self._groups.pop(adapter)
