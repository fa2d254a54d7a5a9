"""The slot of one base model in the pool, loaded or not; the memory that its model needs; the budget of all slots.

The need is an estimate, made before anything is loaded, and decides which models may be loaded side by side.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.common.machine import mebibytes
from models.gguf.header import GgufMeta
from models.store.store import StoredModel
from runtime.errors import EngineError, LoadFailed, NoRoom
from runtime.llama.interface import ModelInfo
from runtime.serving.model import ServedModel
from runtime.serving.names import ModelRef

SlotState = Literal["unloaded", "loading", "ready", "unloading", "failed"]

# llama.cpp's compute buffers, the engine's own tables and those of the grammars, as measured on models below 1 GiB.
OVERHEAD_BYTES = 256 << 20
CACHE_BYTES_PER_VALUE = 2
LOGIT_BYTES = 4
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of a loaded model: its files, the KV cache of `n_ctx` tokens, `n_rows` rows of logits, and the rest.

    `prefixes` is the most that prefixes take which left the KV cache, `panels` the second form of its weights that
    Deskside's own products of prompts read.
    """

    files: int
    n_ctx: int
    cache: int
    n_rows: int
    logits: int
    prefixes: int = 0
    overhead: int = OVERHEAD_BYTES
    panels: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.files + self.cache + self.logits + self.prefixes + self.overhead + self.panels

    def __str__(self) -> str:
        return (
            f"about {mebibytes(self.total)}: {mebibytes(self.files)} of files, {mebibytes(self.cache)} of KV cache for "
            f"{self.n_ctx} tokens, {mebibytes(self.logits)} for {self.n_rows} rows of logits, "
            f"{mebibytes(self.prefixes)} for prefixes, "
            f"{mebibytes(self.overhead)} for the engine"
            + (f", {mebibytes(self.panels)} for the products of prompts (--prefill)" if self.panels else "")
        )


@dataclass
class LoadedModel:
    """An engine in memory: the base model as loaded, and each served name's view of it."""

    base: ServedModel
    views: Mapping[str, ServedModel]
    load_seconds: float = 0.0


@dataclass
class ModelSlot:
    """One base model and the names it is served under (`refs`). Only the pool changes it, on its event loop.

    `leases` counts the requests that use it or wait for it, `waiting` those that wait for its load. `refusal` is the
    error of the last load, None while loaded; after a failure the next load is not before `retry_at_s`. `info` stays
    when the model is unloaded. Times are of the pool's clock, in seconds.
    """

    stored: StoredModel
    refs: tuple[ModelRef, ...]
    need: MemoryNeed
    meta: GgufMeta | None = None
    state: SlotState = "unloaded"
    loaded: LoadedModel | None = None
    info: ModelInfo | None = None
    leases: int = 0
    waiting: int = 0
    last_used_s: float = 0.0
    loading: asyncio.Task[None] | None = None
    refusal: tuple[type[EngineError], str] | None = None
    retry_at_s: float = 0.0
    failures_in_a_row: int = 0
    loads: int = 0
    unloads: int = 0
    failures: int = 0

    @property
    def name(self) -> str:
        """The base model's own name."""
        return self.stored.name

    @property
    def adapters(self) -> dict[str, Path]:
        """Every adapter to load with it: its name -> its LoRA GGUF file."""
        return {name: path for ref in self.refs for name, path in ref.adapters.items()}

    @property
    def broken(self) -> bool:
        """True if it is loaded but its engine has stopped for good."""
        return self.loaded is not None and self.loaded.base.supervisor.state == "failed"

    @property
    def usable(self) -> bool:
        """True if a request can use it without waiting."""
        return self.state == "ready" and not self.broken

    @property
    def idle(self) -> bool:
        """True if it is loaded and no request uses it."""
        return self.loaded is not None and self.leases == 0

    @property
    def shown_state(self) -> SlotState:
        """`state`, or `failed` when its engine has stopped for good."""
        return "failed" if self.broken else self.state


class MemoryBudget:
    """The memory that the models of `slots` may take together: `limit_bytes` (None: no limit)."""

    def __init__(self, slots: Sequence[ModelSlot], limit_bytes: int | None) -> None:
        self._slots = slots
        self._limit_bytes = limit_bytes

    def fits(self, slot: ModelSlot) -> bool:
        """True if `slot` fits beside all loaded models."""
        return self._has_room(slot, [other for other in self._slots if other.loaded is not None])

    def can_fit(self, slot: ModelSlot) -> bool:
        """True if `slot` fits beside the leased models, which cannot be unloaded."""
        return self._has_room(slot, self._busy())

    def require_fits_alone(self, slot: ModelSlot) -> None:
        """Raise LoadFailed, with the numbers and what to change, if `slot` will never fit."""
        if not self._has_room(slot, []):
            raise LoadFailed(
                f"{slot.name!r} needs {slot.need}. The memory budget is {mebibytes(self._limit_bytes or 0)}; "
                "try a smaller --context, fewer --slots, a smaller quantization, or another --memory-budget"
            )

    def no_room(self, slot: ModelSlot) -> NoRoom:
        """The error for a model that would fit if others were not answering."""
        busy = ", ".join(f"{other.name!r} ({mebibytes(other.need.total)})" for other in self._busy())
        return NoRoom(
            f"{slot.name!r} needs about {mebibytes(slot.need.total)}, the memory budget is "
            f"{mebibytes(self._limit_bytes or 0)}, and these are answering: {busy}; try again in a moment, or serve "
            "with a larger --memory-budget"
        )

    def _busy(self) -> list[ModelSlot]:
        return [slot for slot in self._slots if slot.loaded is not None and slot.leases > 0]

    def _has_room(self, slot: ModelSlot, beside: Sequence[ModelSlot]) -> bool:
        needed_bytes = slot.need.total + sum(other.need.total for other in beside)
        return self._limit_bytes is None or needed_bytes <= self._limit_bytes


def model_need(
    meta: GgufMeta,
    files_bytes: int,
    *,
    n_ctx: int,
    n_rows: int,
    n_streams: int = 0,
    prefixes: int = 0,
    panels: int = 0,
) -> MemoryNeed:
    """Estimate the memory of the model described by `meta`. A file without its shape counts by its size alone."""
    # llama.cpp holds the logits twice: as the graph computes them, and as they are handed out.
    logits = 2 * n_rows * meta.n_vocab * LOGIT_BYTES
    keys, values = _cache_values_per_token(meta)
    # A stream's values lie row by row: a value of every token, in pages of memory of which one is used at least.
    begun = n_streams * values * min(PAGE_BYTES, n_ctx * CACHE_BYTES_PER_VALUE)
    cache = n_ctx * (keys + values) * CACHE_BYTES_PER_VALUE + begun
    return MemoryNeed(files_bytes, n_ctx, cache, n_rows, logits, prefixes, panels=panels)


def _cache_values_per_token(meta: GgufMeta) -> tuple[int, int]:
    """Numbers in the keys and in the values of one token in all layers; sliding-window layers keep every token here."""
    family = meta.architecture
    n_layers = meta.number(f"{family}.block_count")
    n_heads = meta.number(f"{family}.attention.head_count")
    width = meta.number(f"{family}.embedding_length") // max(n_heads, 1)
    key = meta.number(f"{family}.attention.key_length") or width
    value = meta.number(f"{family}.attention.value_length") or width
    kv_heads = meta.numbers(f"{family}.attention.head_count_kv", n_layers)
    n_kv_heads = sum(kv_heads) or n_heads * n_layers
    return n_kv_heads * key, n_kv_heads * value
