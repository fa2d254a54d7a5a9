"""The bounds of one engine."""

from dataclasses import dataclass

# Part of the cache that finished prompts may keep, unless an option says otherwise. Every cell up to the last used one
# is scanned by every step. Measured with Gemma 3 270M, Q8_0, on 2 otherwise idle Xeon cores with AMX (30 steps at each
# size, taken in turns, medians): 1k / 2k / 4k / 8k idle cells slow a step of 16 rows (37 ms) by 3 / 2 / 10 / 28 %, one
# of 1 row (18 ms) by nothing that could be told from noise, whatever n_ctx is. A quarter is 2k of the default 8k cells.
# It pays: an idle token that is found saves 0.9 ms of prefill, and costs less than 1 us a step of 16 rows, so one use
# in 900 steps is enough.
IDLE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of one engine.

    A step computes at most `step_tokens` tokens (and never more than the model's `n_batch`) for at most `max_running`
    sequences. Finished prompts may keep `idle_cells` of the KV cache for others to share (None: a quarter); each of
    them needs a sequence id too, so load the model with `n_seq_max` ids. An answer that copies its input has at most
    `max_drafts` tokens verified ahead in a step (0: none; None: as many as pay).
    """

    step_tokens: int = 512
    max_running: int = 16
    idle_cells: int | None = None
    max_drafts: int | None = 0

    @property
    def n_seq_max(self) -> int:
        """Sequence ids the model should be loaded with: the running ones and as many idle prefixes."""
        return min(2 * self.max_running, 256)

    def idle_bound(self, n_ctx: int) -> int:
        """How many of `n_ctx` cells finished prompts may keep."""
        return int(n_ctx * IDLE_SHARE) if self.idle_cells is None else self.idle_cells
