"""The nouns of scheduling: live sequences, chunks of their tokens, edits of the KV cache, and the plan of a step."""

from dataclasses import dataclass

from runtime.requests import Request


@dataclass(slots=True)
class ScheduledSequence:
    """A request while the engine works on it.

    `arrival` numbers requests in the order they came: the lower goes first. `tokens` is the prompt followed by what was
    generated. The first `n_computed` of them are in the KV cache under `seq_id` (None while waiting or pre-empted).
    `n_cached` of the prompt's tokens were found there already. `n_ahead` of the generated tokens were forced by a
    grammar before anything was drawn. The logits after token `first_row`
    and every later one are wanted (None: those after the last one only, which is what an answer that is being written
    needs).
    """

    request: Request
    arrival: int
    tokens: list[int]
    seq_id: int | None = None
    n_computed: int = 0
    n_cached: int = 0
    n_ahead: int = 0
    first_row: int | None = None

    @property
    def n_generated(self) -> int:
        """How many tokens were generated so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start … start+count-1` of `sequence`, to be computed, with the logits of the last `n_rows` of them.

    The last of them may be `drafts`: tokens that were not drawn yet, but may well be.
    """

    sequence: ScheduledSequence
    start: int
    count: int
    n_rows: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether logits come of it."""
        return self.n_rows > 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt: `length` tokens, held by sequence id `source` (None: nobody)."""

    source: int | None
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Share the first `length` cells of `source` with `target` (both sequence ids)."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Take `seq_id` out of the cells at positions `start` and up; cells nobody is left in become free."""

    seq_id: int
    start: int = 0


Edit = Copy | Remove


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does: edit the KV cache, in this order, then compute these chunks in one decode under `adapter`."""

    edits: tuple[Edit, ...]
    chunks: tuple[Chunk, ...]
    adapter: str | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens in the decode."""
        return sum(chunk.count for chunk in self.chunks)
