"""The models of one server, loaded and unloaded within a memory budget.

A request leases the model it names until its answer is out. The first request for a model loads it, once for all
requests that wait. A model is unloaded after an idle time, or when another needs its memory: the least recently used
first, and never a leased one. Everything but loading and stopping runs on one event loop, so that no two decisions
overlap; one load or unload runs at a time.
"""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from models.common.machine import machine_budget
from models.errors import did_you_mean
from models.gguf.header import read_meta
from models.store.store import Store, StoredModel
from runtime.config import RuntimeConfig
from runtime.engine.options import EngineOptions, snapshot_bytes
from runtime.errors import EngineDown, EngineError, LoadFailed, ModelUnknown, NoRoom, Overloaded, ShuttingDown
from runtime.prefill.prompts import extra_bytes
from runtime.serving.model import ServedModel, load_model, under_name
from runtime.serving.names import ModelRef, find

from .slot import LoadedModel, MemoryBudget, ModelSlot, model_need

ModelLoader = Callable[[StoredModel, Mapping[str, Path]], ServedModel]
"""Loads a base model with adapters (name -> file). Blocks. Raises EngineError."""

# Shortest time between a failed load and the next try; doubles with each further failure.
RETRY_SECONDS = 15.0
MOST_DOUBLINGS = 5

_log = logging.getLogger("deskside.pool")


@dataclass(frozen=True)
class PoolOptions:
    """Bounds of a pool.

    `budget_bytes` bounds the memory of all loaded models together (None: no bound). At most `capacity` requests wait
    for the load of one model. `idle_s` is the idle time before a model is unloaded (0: never). A load waits
    `room_wait_s` for a leased model to become idle.
    """

    budget_bytes: int | None = None
    capacity: int = 256
    idle_s: float = 0.0
    room_wait_s: float = 5.0


class ModelPool:
    """The models of one server, by the names they are served under; the first one answers requests that name none."""

    def __init__(
        self,
        slots: Sequence[ModelSlot],
        load: ModelLoader,
        options: PoolOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = tuple(slots)
        self.options = options
        self.served: Mapping[str, tuple[ModelSlot, ModelRef]] = {w.id: (slot, w) for slot in slots for w in slot.refs}
        self.default = next(iter(self.served))
        self._budget = MemoryBudget(self.slots, options.budget_bytes)
        self._load_model = load
        self._clock = clock
        self._moving = asyncio.Lock()
        self._released = asyncio.Event()
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """True once new requests are refused because the server stops."""
        return self._closed

    @property
    def live(self) -> int:
        """Accepted requests of all models that have not ended."""
        return sum(loaded.base.supervisor.live for _, loaded in self._all_loaded())

    @property
    def broken(self) -> bool:
        """True if every model's engine has stopped for good."""
        return all(slot.broken for slot in self.slots)

    @property
    def last_cause(self) -> str:
        """The reason, for each loaded model, why its last engine ended."""
        causes = {slot.name: slot.loaded.base.supervisor.last_cause for slot in self.slots if slot.loaded is not None}
        return "; ".join(f"{name}: {cause}" for name, cause in causes.items() if cause)

    def find(self, name: str | None) -> tuple[ModelSlot, ModelRef]:
        """The slot and reference of `name` (None: the first). Raises ModelUnknown with the names served."""
        if name is not None and name not in self.served:
            known = ", ".join(map(repr, self.served))
            near = did_you_mean(name, self.served)
            raise ModelUnknown(f"model {name[:200]!r} is not served here; this server has {known}{near}", param="model")
        return self.served[name or self.default]

    def require_open(self) -> None:
        """Raise ShuttingDown once the server stops."""
        if self._closed:
            raise ShuttingDown("the server takes no requests while it is draining")

    def load_at_start(self) -> None:
        """Load the first model, and those of the others that fit beside it. Blocks; call it before the event loop runs.

        Raises LoadFailed, also for a model that will never fit.
        """
        for slot in self.slots:
            self._budget.require_fits_alone(slot)
        try:
            for slot in self.slots:
                if slot is self.slots[0] or self._budget.fits(slot):
                    self._arrive(slot, self._load_now(slot))
        except BaseException:
            self.close()
            raise

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and unload models as requests come, until the block ends; then stop all."""
        self._closing = asyncio.get_running_loop().create_future()
        reaper = asyncio.create_task(self._reap()) if self.options.idle_s else None
        try:
            yield
        finally:
            self._close_doors()
            if reaper is not None:
                reaper.cancel()
                await asyncio.wait([reaper])
            if loading := [slot.loading for slot in self.slots if slot.loading is not None]:
                await asyncio.wait(loading)
            async with self._moving:
                await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stop every engine that is loaded. Blocks."""
        for slot, loaded in self._all_loaded():
            slot.loaded, slot.state = None, "unloaded"
            loaded.base.supervisor.stop()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the accepted ones finish for `timeout_s`, then fail the rest."""
        self._close_doors()
        await asyncio.gather(*(loaded.base.supervisor.drain(timeout_s) for _, loaded in self._all_loaded()))

    @asynccontextmanager
    async def lease(self, name: str | None = None) -> AsyncIterator[ServedModel]:
        """The model `name` (None: the first), loaded if it is not; it stays loaded until the block ends.

        Raises ModelUnknown, ShuttingDown, Overloaded (too many wait for the same load), LoadFailed, NoRoom, EngineDown.
        """
        self.require_open()
        slot, ref = self.find(name)
        slot.leases += 1
        try:
            if not slot.usable:
                await self._wait_for(slot)
            assert slot.loaded is not None, "a leased model stays loaded"
            yield slot.loaded.views[ref.id]
        finally:
            slot.leases -= 1
            slot.last_used_s = self._clock()
            self._released.set()

    async def unload_idle(self) -> None:
        """Unload the models that have been idle for `idle_s` or longer."""
        async with self._moving:
            for slot in self.slots:
                if slot.idle and self._clock() - slot.last_used_s >= self.options.idle_s:
                    await self._unload(slot)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(min(self.options.idle_s / 4, 30.0))
            try:
                await self.unload_idle()
            except Exception:  # noqa: BLE001 - a model that cannot be stopped must not keep the others in memory
                _log.exception("an idle model could not be unloaded")

    async def _wait_for(self, slot: ModelSlot) -> None:
        """Wait until `slot` is usable, loading it if needed. Raises the error of the load, or of a recent one."""
        if slot.broken and slot.state == "ready":
            self._note_breakdown(slot)
        if slot.state == "failed" and slot.refusal is not None and self._clock() < slot.retry_at_s:
            kind, text = slot.refusal
            raise kind(f"{text}; it is tried again in {slot.retry_at_s - self._clock():.0f} s at the earliest")
        if slot.waiting >= self.options.capacity:
            message = f"{slot.waiting} requests wait for {slot.name!r} to be loaded, limit {self.options.capacity}"
            raise Overloaded(message, retry_after_s=1)
        if slot.loading is None:
            slot.loading = asyncio.create_task(self._load(slot))
        assert self._closing is not None, "models are leased while the pool is running"
        slot.waiting += 1
        try:
            await asyncio.wait({slot.loading, self._closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            slot.waiting -= 1
        self.require_open()
        if slot.refusal is not None:
            kind, text = slot.refusal
            raise kind(text)

    def _note_breakdown(self, slot: ModelSlot) -> None:
        assert slot.loaded is not None, "only an engine that was loaded breaks"
        try:
            slot.loaded.base.supervisor.require_room(0)
        except EngineError as error:
            self._fail(slot, EngineDown(f"{slot.name!r}: {error}"))

    async def _load(self, slot: ModelSlot) -> None:
        """Make room and load. Raises nothing: every waiting request finds the error in `slot.refusal`."""
        try:
            async with self._moving:
                if slot.broken:
                    await self._unload(slot)
                await self._make_room(slot)
                slot.state = "loading"
                loaded = await asyncio.to_thread(self._load_now, slot)
                self._arrive(slot, loaded)
        except (NoRoom, ShuttingDown) as error:
            slot.state, slot.refusal = "unloaded", (type(error), str(error))
        except Exception as error:  # noqa: BLE001 - the waiting requests must get every error
            self._fail(slot, error)
        finally:
            slot.loading = None

    def _load_now(self, slot: ModelSlot) -> LoadedModel:
        started_s = time.monotonic()
        base = self._load_model(slot.stored, slot.adapters)
        try:
            views = {ref.id: under_name(ref, base) for ref in slot.refs}
        except BaseException:
            base.supervisor.stop()
            raise
        return LoadedModel(base, views, time.monotonic() - started_s)

    def _arrive(self, slot: ModelSlot, loaded: LoadedModel) -> None:
        slot.loaded, slot.info, slot.state = loaded, loaded.base.info, "ready"
        slot.refusal, slot.failures_in_a_row = None, 0
        slot.loads += 1
        slot.last_used_s = self._clock()
        _log.info("%s is loaded (%.1f s)", slot.name, loaded.load_seconds)

    def _fail(self, slot: ModelSlot, error: Exception) -> None:
        _log.error("%s: %s", slot.name, error, exc_info=None if isinstance(error, EngineError) else error)
        kind = type(error) if isinstance(error, EngineError) else LoadFailed
        text = str(error) if isinstance(error, EngineError) else f"{slot.name!r} cannot be loaded: {error!r}"
        slot.state, slot.refusal = "failed", (kind, text)
        slot.failures += 1
        slot.retry_at_s = self._clock() + RETRY_SECONDS * 2 ** min(slot.failures_in_a_row, MOST_DOUBLINGS)
        slot.failures_in_a_row += 1

    async def _make_room(self, slot: ModelSlot) -> None:
        """Unload idle models, least recently used first, until `slot` fits. Raises LoadFailed, NoRoom, ShuttingDown."""
        self._budget.require_fits_alone(slot)
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self.options.room_wait_s
        while not self._budget.can_fit(slot):
            self._released.clear()
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._released.wait()
            except TimeoutError:
                raise self._budget.no_room(slot) from None
            self.require_open()
        while not self._budget.fits(slot):
            await self._unload(min((other for other in self.slots if other.idle), key=lambda other: other.last_used_s))
        self.require_open()

    async def _unload(self, slot: ModelSlot) -> None:
        going, slot.loaded = [slot.loaded], None
        slot.state = "unloading"
        slot.unloads += 1
        try:
            await asyncio.to_thread(_stop_and_free, going)
        finally:
            slot.state = "unloaded"
        _log.info("%s is unloaded", slot.name)

    def _close_doors(self) -> None:
        self._closed = True
        self._released.set()
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    def _all_loaded(self) -> list[tuple[ModelSlot, LoadedModel]]:
        return [(slot, slot.loaded) for slot in self.slots if slot.loaded is not None]


def _stop_and_free(going: list[LoadedModel | None]) -> None:
    """Stop the engine in `going`, which holds the last reference to it, and free its memory."""
    loaded = going.pop()
    assert loaded is not None, "only a loaded model is unloaded"
    loaded.base.supervisor.stop()
    del loaded
    # An engine's parts refer to one another in cycles, which only the garbage collector frees.
    gc.collect()


def open_pool(names: Sequence[str], config: RuntimeConfig, store: Store) -> ModelPool:
    """The pool of the models `names`, none loaded yet; the first of them answers requests that name none.

    Raises the errors of `find`, BadGguf, or LoadFailed if two different models have one name.
    """
    by_base: dict[Path, dict[str, ModelRef]] = {}
    seen: dict[str, ModelRef] = {}
    for name in names:
        ref = find(name, store)
        known = seen.setdefault(ref.id, ref)
        if known.base.gguf.resolve() != ref.base.gguf.resolve():
            files = f"{str(known.base.gguf)!r} and {str(ref.base.gguf)!r}"
            raise LoadFailed(f"two models would be served as {ref.id!r}: {files}; rename one of the files")
        by_base.setdefault(ref.base.gguf.resolve(), {})[ref.id] = ref

    def load(stored: StoredModel, adapters: Mapping[str, Path]) -> ServedModel:
        return load_model(stored, config, adapters)

    slots = [_slot(tuple(refs.values()), config) for refs in by_base.values()]
    budget = machine_budget() if config.memory_budget is None else int(config.memory_budget * 2**30)
    return ModelPool(slots, load, PoolOptions(budget, config.slots + config.queue, config.idle_minutes * 60))


def _slot(refs: tuple[ModelRef, ...], config: RuntimeConfig) -> ModelSlot:
    stored = refs[0].base
    meta = read_meta(stored.gguf)
    if meta.is_adapter:
        raise LoadFailed(f"{str(stored.gguf)!r} is a LoRA adapter and no model; install it and serve it as BASE:NAME")
    files = {stored.gguf, *(path for ref in refs for path in ref.adapters.values())}
    options = EngineOptions(step_tokens=config.step_tokens, max_running=config.slots)
    size_bytes = sum(file.stat().st_size for file in files)
    prefixes = snapshot_bytes(config.prefix_memory, config.memory_budget)
    panels = 0 if config.prefill == "stock" else extra_bytes(stored.gguf)
    need = model_need(
        meta,
        size_bytes,
        n_ctx=config.context,
        n_rows=options.n_outputs,
        n_streams=config.slots,
        prefixes=prefixes,
        panels=panels,
    )
    return ModelSlot(stored, refs, need, meta)
