"""The engine: continuous batching of many requests over one model. `step()` plans, decodes and hands out the logits.

    add ─► Job ─► sequences ─► Scheduler ─► StepPlan (+ drafts) ─► llama_decode ─► logits
            ▲                                                                        │
            └─────── owner.advance(chunk, logits) ─► events ◄────────────────────────┘

Each type of request is a `Job`: `Writer`, `Scorer` or `Embedder`. Writer and Scorer share
steps: the scheduler plans their sequences, and each chunk's logits go to the owner of its sequence. The Embedder makes
steps of its own, every other one while there is text to compute.

One thread owns an engine. Every request that `add` accepts ends in exactly one terminal event, from `step` or `cancel`.
A failed decode is no reason to fail a neighbour: without room in the cache the next step does less, and a malformed
batch is taken apart to find the guilty sequence. Only a fatal code ends all requests, and the engine with them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from runtime.decoding.grammar import Grammars
from runtime.errors import (
    BatchInvalid,
    Cancelled,
    DecodeAborted,
    DecodeFailed,
    InvalidRequest,
    ModelUnknown,
    NoKvSlot,
)
from runtime.kv_cache.cells import KvCache
from runtime.kv_cache.prefix_cache import Edit, PrefixCache
from runtime.kv_cache.snapshots import Snapshots
from runtime.llama.interface import Batch, LlamaLike
from runtime.prefixes.disk import DiskStore
from runtime.requests import Embedding, EngineStats, Event, Failed, Request, Scoring, Work
from runtime.scheduling.plan import ScheduledSequence, StepPlan
from runtime.scheduling.scheduler import Scheduler

from .drafts import Drafts
from .embedding import Embedder
from .options import ARRIVALS, EngineOptions, TokenCounts
from .scoring import Scorer
from .writing import Writer

RequestT = TypeVar("RequestT", contravariant=True)


class Job(Protocol[RequestT]):
    """All live requests of one type. The engine keeps one `Job` for each, and asks only that.

    Jobs that compute sequences are their `Owner` too (`runtime/scheduling/plan.py`), so that a step's logits find their
    way back without a table.
    """

    @property
    def live(self) -> Mapping[str, object]:
        """The requests without a terminal event yet, by id."""

    def check(self, request: RequestT) -> None:
        """Raise InvalidRequest or ContextTooLong for a request that the edge should have refused."""

    def add(self, request: RequestT) -> None:
        """Begin a request that was checked. Raises InvalidRequest if its grammar cannot be used."""

    def drop(self, request_id: str) -> None:
        """Forget a live request; its cells are free with the next edits."""

    def clear(self) -> None:
        """Forget all requests of an engine that is dead."""


class Engine:
    """Continuous batching over one `LlamaLike`; without `grammars` it takes no request with a grammar.

    `clock`, in seconds, times steps and decodes: whether drafts pay depends on it, the text of an answer does not. With
    `disk` prefixes outlive the engine, which closes it.
    """

    def __init__(
        self,
        llama: LlamaLike,
        options: EngineOptions | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.perf_counter,
        disk: DiskStore | None = None,
    ) -> None:
        options = options or EngineOptions()
        info = llama.info
        self._llama = llama
        self._snapshots = snapshots = _snapshots(options, info.cut_limit, keeps=disk is not None)
        self._kv = KvCache(llama, snapshots, disk)
        self._cache = PrefixCache(info.n_ctx, info.n_seq_max, info.cut_limit, snapshots)
        self._scheduler = scheduler = Scheduler(
            self._cache,
            step_tokens=min(options.step_tokens, info.n_batch),
            max_running=min(options.max_running, info.n_seq_max),
            max_rows=options.max_rows,
            row_group=1 if options.fast else info.row_group,
            keep_prompts=options.keep_prefixes,
            keep_answers=options.fast,
        )
        self._counts = counts = TokenCounts()
        arrivals = count(step=ARRIVALS)
        max_rows = options.max_rows if options.fast else info.rows_alike
        self._drafts = Drafts(options.max_drafts, max_rows) if max_rows > 1 and options.max_drafts != 0 else None
        scorer = Scorer(info, scheduler, arrivals, counts, at_once=max(1, options.max_running // 2))
        self._writer = Writer(llama, scheduler, arrivals, counts, grammars, self._drafts, scorer)
        self._embedder = Embedder(llama, counts, at_once=info.embed_n_seq_max if options.fast else 1)
        self._jobs: dict[type, Job[Any]] = {
            Request: self._writer,
            Scoring: scorer,
            Embedding: self._embedder,
        }
        self._embedded_last = False
        self._failure: DecodeFailed | None = None
        self._n_steps = 0
        self._stepping, self._decoding = Stopwatch(clock), Stopwatch(clock)

    @property
    def has_work(self) -> bool:
        """True if `step` has something to do."""
        return any(job.live for job in self._jobs.values())

    @property
    def keeps(self) -> bool:
        """True if prefixes outlive this engine, on disk."""
        return self._kv.on_disk

    @property
    def failure(self) -> DecodeFailed | None:
        """The fatal error that ended this engine, if any. Its requests were failed by the step that met it."""
        return self._failure

    def add(self, request: Work) -> None:
        """Accept a request.

        Raises ContextTooLong, InvalidRequest or ModelUnknown for a request that the edge should have refused, and the
        fatal DecodeFailed if there was one.
        """
        self._raise_if_dead()
        if self._job_of(request.id) is not None:
            raise InvalidRequest(f"request id {request.id!r} is already live", param="id")
        adapters = self._llama.info.adapters
        if request.adapter is not None and request.adapter not in adapters:
            raise ModelUnknown(f"adapter {request.adapter!r} is not loaded; loaded are {list(adapters)}", param="model")
        job = self._jobs[type(request)]
        job.check(request)
        job.add(request)

    def prepare(self, request: Work) -> None:
        """Compile the request's grammar, from any thread, so that no step waits for it. Raises InvalidRequest."""
        if isinstance(request, Request):
            self._writer.prepare(request)

    def cancel(self, request_id: str, error: Exception | None = None) -> list[Event]:
        """End a request with `error` (None: Cancelled) and free its cells at once. No event if it is not live."""
        job = self._job_of(request_id)
        if job is None:
            return []
        job.drop(request_id)
        self._edit(self._cache.take_edits())
        return [Failed(request_id, error or Cancelled(f"request {request_id!r} was cancelled"))]

    def step(self) -> list[Event]:
        """At most one decode, and its events. A fatal error fails every request; only the next step raises it."""
        self._raise_if_dead()
        with self._stepping:
            try:
                return self._step()
            except Exception as error:  # noqa: BLE001 - no error may leave a client waiting
                return self._die(error)

    def stats(self) -> EngineStats:
        """The engine's state right now, and its totals since it began."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_cells_used=self._cache.used_cells,
            kv_cells_total=self._cache.n_cells,
            prompt_tokens_total=self._counts.prompt,
            cached_tokens_total=self._counts.cached,
            generated_tokens_total=self._counts.generated,
            steps_total=self._n_steps,
            preemptions_total=self._scheduler.n_preemptions,
            draft_tokens_total=0 if self._drafts is None else self._drafts.n_drafted,
            draft_tokens_accepted_total=0 if self._drafts is None else self._drafts.n_accepted,
            decode_seconds_total=self._decoding.total_s,
            step_seconds_total=self._stepping.total_s,
            snapshot_bytes=0 if self._snapshots is None else self._snapshots.n_bytes,
            snapshots_restored_total=self._kv.n_restored,
            **self._kv.counts,
        )

    def check(self, held: Mapping[int, int]) -> None:
        """Raise AssertionError unless scheduler and KV cache agree, with each other and with the real cache.

        `held` are the cells that each sequence id holds there; ids without any are left out.
        """
        self._cache.check()
        self._kv.check()
        running = {sequence.seq_id for sequence in self._scheduler.running}
        residents = self._cache.residents
        assert running <= residents.keys(), "a running sequence is not in the cache"
        assert {seq_id: n_cells for seq_id, n_cells in residents.items() if n_cells} == held, "the real cache differs"

    def rest(self) -> None:
        """Give the KV cache's memory back while there is nothing to do; what it holds is kept as snapshots."""
        if not self.has_work and self._failure is None and self._cache.evict_idle():
            self._edit(self._cache.take_edits())
            self._kv.clear()

    def close(self) -> None:
        """Free the model. Cancel live requests first: closing emits no events. What is idle is kept on disk, if any."""
        if self._failure is None and self.keeps:
            self._cache.evict_idle()
            self._edit(self._cache.take_edits())
        self._kv.close()
        self._writer.close()
        self._llama.close()

    def _step(self) -> list[Event]:
        text_waits = self._scheduler.has_work
        self._embedded_last = bool(self._embedder.live) and not (self._embedded_last and text_waits)
        if self._embedded_last:
            return self._embedder.step()
        plan = self._scheduler.plan()
        if plan is None:
            return []
        if not self._edit(plan.edits):
            return []
        if self._drafts is not None:
            plan = self._drafts.extend(plan, self._scheduler, self._writer.live)
        events = self._compute(plan)
        self._edit(self._cache.take_edits())
        return events

    def _compute(self, plan: StepPlan) -> list[Event]:
        self._writer.start_masks(plan)
        try:
            batch = batch_of(plan)
            self._llama.use_adapter(plan.adapter)
            with self._decoding:
                logits = self._llama.decode(batch)
                for chunk in plan.chunks:
                    if chunk.n_pad:
                        self._llama.remove(chunk.seq_id, chunk.start + chunk.count)
        except (NoKvSlot, BatchInvalid, DecodeAborted) as error:
            return self._retry(plan, error)
        if self._drafts is not None:
            self._drafts.timed(plan, self._decoding.last_s)
        self._n_steps += 1
        self._scheduler.commit(plan)
        return self._hand_out(plan, logits)

    def _hand_out(self, plan: StepPlan, logits: np.ndarray) -> list[Event]:
        """Give each chunk's rows of logits to its owner. Returns the owners' events."""
        events: list[Event] = []
        n_read = 0
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            rows = logits[n_read : n_read + chunk.n_rows]
            n_read += chunk.n_rows
            try:
                for event in chunk.sequence.owner.advance(chunk, rows):
                    events.append(event)  # one by one: those before an error are sent
            except Exception as error:  # noqa: BLE001 - one request's fault must not be its neighbours'
                events.append(self._fail(chunk.sequence, error))
        return events

    def _retry(self, plan: StepPlan, error: NoKvSlot | BatchInvalid | DecodeAborted) -> list[Event]:
        """Recover from a decode that harmed no sequence: do less next time, or fail the sequence that failed alone."""
        if not isinstance(error, NoKvSlot):
            for chunk in plan.chunks:
                self._llama.remove(chunk.seq_id, chunk.start)
        if self._drafts is not None and self._drafts.withdraw(plan):
            return []
        again = self._scheduler.shrink if isinstance(error, NoKvSlot) else self._scheduler.isolate
        return [] if again(plan) else [self._fail(plan.chunks[0].sequence, error)]

    def _fail(self, sequence: ScheduledSequence, error: Exception) -> Failed:
        sequence.owner.drop(sequence.request_id)
        return Failed(sequence.request_id, error)

    def _edit(self, edits: Sequence[Edit]) -> bool:
        """Carry out the edits. False if a sequence's cells are not whole after them: it is computed again."""
        lost = self._kv.apply(edits)
        for seq_id, (snapshot, source) in lost.items():
            self._scheduler.lose(seq_id, snapshot, source)
        if lost:
            self._edit(self._cache.take_edits())
        return not lost

    def _die(self, error: Exception) -> list[Event]:
        if not isinstance(error, DecodeFailed):
            fatal = DecodeFailed(f"the engine broke: {type(error).__name__}: {error}")
            fatal.__cause__ = error
        else:
            fatal = error
        self._failure = fatal
        failed = [request_id for job in self._jobs.values() for request_id in job.live]
        self._scheduler.clear()
        for job in self._jobs.values():
            job.clear()
        return [Failed(request_id, fatal) for request_id in failed]

    def _job_of(self, request_id: str) -> Job[Any] | None:
        return next((job for job in self._jobs.values() if request_id in job.live), None)

    def _raise_if_dead(self) -> None:
        if self._failure is not None:
            raise self._failure


def _snapshots(options: EngineOptions, cut_limit: int | None, *, keeps: bool) -> Snapshots | None:
    n_bytes = options.snapshot_bytes
    return Snapshots(n_bytes, cut_limit, at_once=keeps) if (n_bytes or keeps) and cut_limit is not None else None


class Stopwatch:
    """`with watch:` adds the block's seconds, `last_s`, to `total_s`, also when it raises. Not reentrant."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self._clock = clock
        self._began_s = 0.0
        self.last_s = 0.0
        self.total_s = 0.0

    def __enter__(self) -> None:
        self._began_s = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.last_s = self._clock() - self._began_s
        self.total_s += self.last_s


def batch_of(plan: StepPlan) -> Batch:
    """The arrays of the plan's decode."""
    counts = [chunk.count + chunk.n_pad for chunk in plan.chunks]
    tokens = [
        (*chunk.sequence.tokens[chunk.start : chunk.start + chunk.count], *chunk.drafts, *[0] * chunk.n_pad)
        for chunk in plan.chunks
    ]
    ends = np.cumsum(counts)
    wants_logits = np.zeros(ends[-1], np.int8)
    for end, chunk in zip(ends, plan.chunks, strict=True):
        wants_logits[end - chunk.n_pad - chunk.n_rows : end - chunk.n_pad] = 1
    starts = np.repeat([chunk.start for chunk in plan.chunks] - (ends - counts), counts)
    return Batch(
        tokens=np.fromiter(chain.from_iterable(tokens), np.int32, ends[-1]),
        positions=(starts + np.arange(ends[-1])).astype(np.int32),
        seq_ids=np.repeat([chunk.seq_id for chunk in plan.chunks], counts).astype(np.int32),
        wants_logits=wants_logits,
        rows=all(count - len(chunk.drafts) == 1 for count, chunk in zip(counts, plan.chunks, strict=True)),
    )
