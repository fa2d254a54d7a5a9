"""The bounds of one engine, and its counts of tokens."""

from dataclasses import dataclass

from models.common.machine import machine_budget
from runtime.requests import MAX_SCORED_CHOICES

# Memory for snapshots by default: at most so many bytes, and at most this share of what models may take.
SNAPSHOT_BYTES = 1 << 30
SNAPSHOT_SHARE = 0.1
# Arrival numbers that one prompt may give its sequences: its own, and one for each choice that may fork off.
ARRIVALS = MAX_SCORED_CHOICES + 1
# Rows of logits that a step with drafts may give, however few answers there are.
DRAFT_ROWS = 16


def snapshot_bytes(prefix_memory: float | None, memory_budget: float | None) -> int:
    """Bytes for snapshots by the two settings, in GiB; None is "auto"."""
    if prefix_memory is not None:
        return int(prefix_memory * 2**30)
    budget = machine_budget() if memory_budget is None else int(memory_budget * 2**30)
    return SNAPSHOT_BYTES if budget is None else min(SNAPSHOT_BYTES, int(SNAPSHOT_SHARE * budget))


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of one engine.

    A step computes at most `step_tokens` tokens (and never more than the model's `n_batch`) for at most `max_running`
    sequences. Finished prompts are kept for others to share (`keep_prefixes`); those that left the KV cache as
    snapshots in at most `snapshot_bytes` of memory (0: none).

    The same request gets the same logits, bit for bit, on one machine with one model and these options, beside any
    others and with anything cached, where the model computes in streams on a CPU. A `fast` engine
    gives it up: later prompts begin with cells computed as an answer's, and texts are embedded together.

    An answer that copies its input has at most `max_drafts` tokens verified ahead in a step (0: none; None: as many as
    pay), if the engine is `fast` or that leaves the bits as they are (`ModelInfo.rows_alike`).
    """

    step_tokens: int = 512
    max_running: int = 16
    max_drafts: int | None = None
    fast: bool = False
    keep_prefixes: bool = True
    snapshot_bytes: int = 0

    @property
    def max_rows(self) -> int:
        """Rows of logits that a step may give: more than one for each answer, since each token of a choice has one."""
        return min(2 * self.max_running, 256)

    @property
    def n_outputs(self) -> int:
        """Rows of logits to have room for: those of a step, also one of a single answer with drafts."""
        return max(self.max_rows, DRAFT_ROWS)


@dataclass(slots=True)
class TokenCounts:
    """Tokens of all requests since the engine began; `cached` of the `prompt` tokens were never computed."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
