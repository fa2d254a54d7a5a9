"""The bounds of one engine."""

from dataclasses import dataclass

from models.common.machine import machine_budget

# Part of the cache that finished prompts may keep by default. Every step reads every cell up to the last used one.
# Measured with Gemma 3 270M, Q8_0, on 2 nearly idle Xeon cores with AMX (30 steps at each size, taken in turns,
# medians): 1k / 2k / 4k / 8k idle cells slow a step of 16 rows (37 ms) by 3 / 2 / 10 / 28 %, one of 1 row (18 ms) by no
# more than noise, at any n_ctx. Prefill pays more, since each row of a step does: 512 tokens take 416 ms, 460
# beside 2k other cells, 510 beside 6k, so an idle cell costs about 20 us. An idle token that is found saves 0.8 ms: one
# use in 40 such steps is enough, one in 800 where only rows are decoded. Where no prefix is ever shared (48 replies of
# 64 tokens to prompts of 283, 16 clients) the quarter, 2k of the default 8k cells, takes about a tenth of the processor
# time.
IDLE_SHARE = 0.25
# Cells that the sequences of decode rows may hold in all while they share a step with prompts on a CPU: see
# `Scheduler`. Processor time on the same cores, busy with other work (least of 3, the two ways in turns): 16 rows and a
# prompt of 40 … 480 tokens in one step take 0.86 … 1.07 (median 0.97) of what two steps take when the rows' sequences
# hold 128 cells, 0.85 … 1.25 (1.03) at 512, 0.88 … 1.99 (1.41) at 2k; 1.05 … 1.45 at 1k. Steps of more rows than 16 are
# dearer (choices to score), so theirs break even later: with 640, 16 clients' decisions are planned as if always mixed.
MIX_CELLS = 640
# Tokens of a prompt's chunk in a deterministic engine: a prompt that shares a prefix computes at most so many again.
WHOLE_CHUNK = 64


# Memory for snapshots by default: at most so many bytes, and at most this share of what models may take.
SNAPSHOT_BYTES = 1 << 30
SNAPSHOT_SHARE = 0.1


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
    sequences. Finished prompts may keep `idle_cells` of the KV cache for others to share (None: a quarter); each of
    them needs a sequence id too, so load the model with `n_seq_max` ids. An answer that copies its input has at most
    `max_drafts` tokens verified ahead in a step (0: none; None: as many as pay). Answers that hold more than
    `mix_cells` cells in all share no step with prompts (None: the measured bound; none on a GPU).

    A `deterministic` engine gives the same request the same logits, bit for bit, on one machine with one model and
    these options: requests are answered one after another, each alone in the KV cache but for the whole chunks of the
    prompt before that it shares, and in chunks that depend on its own tokens alone (see `Scheduler`). It makes no
    drafts, and embeds one text at a time.

    Evicted prefixes are kept as snapshots in at most `snapshot_bytes` of memory (0: none; a deterministic engine takes
    none, since restored cells lie in another order, which changes the last bits).
    """

    step_tokens: int = 512
    max_running: int = 16
    idle_cells: int | None = None
    max_drafts: int | None = 0
    mix_cells: int | None = None
    deterministic: bool = False
    snapshot_bytes: int = 0

    @property
    def n_seq_max(self) -> int:
        """Sequence ids the model should be loaded with: the running ones and as many idle prefixes."""
        return min(2 * self.max_running, 256)

    @property
    def snapshot_bound(self) -> int:
        """Bytes of snapshots that are kept in memory."""
        return 0 if self.deterministic else self.snapshot_bytes

    @property
    def at_once(self) -> int:
        """Sequences that are computed at the same time."""
        return 1 if self.deterministic else self.max_running

    def idle_bound(self, n_ctx: int) -> int:
        """The cells, of `n_ctx`, that finished prompts may keep. A deterministic engine's steps never read them."""
        share = 1.0 if self.deterministic else IDLE_SHARE
        return int(n_ctx * share) if self.idle_cells is None else self.idle_cells

    def whole_chunk(self, step_tokens: int) -> int | None:
        """The scheduler's `whole_chunk`, where a step has room for `step_tokens`."""
        return min(WHOLE_CHUNK, step_tokens) if self.deterministic else None

    def mix_bound(self, gpu_layers: int) -> int | None:
        """The cells that answers may hold in all while they share a step with prompts; None: any number.

        A GPU's attention has no such tiles, so a model with `gpu_layers` on one is bounded only by an explicit option.
        """
        return MIX_CELLS if self.mix_cells is None and gpu_layers == 0 else self.mix_cells
