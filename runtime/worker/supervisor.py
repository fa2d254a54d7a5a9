"""The supervisor of one engine: callers submit requests, and events come back to the callers' own event loops.

Every accepted request ends in exactly one terminal event: the engine's, or the supervisor's own when the engine is
gone. When an engine ends, the supervisor launches another one: a request of which nothing was delivered is sent to that
one too, once; the others fail.

    SERVER'S PROCESS                                            ENGINE'S PROCESS (worker/child.py)

    asyncio loop(s)                                             deskside-reader
      submit, cancel, drain                                       frames -> Add, Cancel
      owns each call's Stream                                     end of input -> exit at once
        |           ^                                               |
        |           | call_soon_threadsafe,                         v  (c) SimpleQueue `arrived`
        |           | once a step and loop                      deskside-prepare
        v           |                                             compiles grammars ahead (engine.prepare)
    InflightRequests  (a) at most slots + queue                     |
        |           ^                                               v  (d) SimpleQueue `inbox`
        |           | deliver                                   main
        |       deskside-engine                                   owns the engine and all of llama.cpp:
        |         owns the EngineRun: relaunches, restarts,       add, cancel, step
        |         reads the pipe  <------- pipe: Ready, Stepped, --|
        v                                  Logged, Died            |
    (b) SimpleQueue                                             deskside-grammar-masks
        |                                                         a grammar's next tokens, while main decodes
        v
    deskside-to-engine ------------------> pipe: Start, Add, Cancel --> deskside-reader
      the only thread that waits for a full pipe
    deskside-watch
      SIGKILL to an engine that has work and is silent

One lock, `_changed`, guards the state and the inflight requests. Only (a) has a bound of its own: `submit` refuses with
Overloaded what exceeds it. It bounds the others, since (b), (c) and (d) hold an Add for each accepted request at most
and a Cancel for each. A Stream holds the events of its own requests, at most max_tokens each.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from runtime.errors import (
    Cancelled,
    EngineDied,
    EngineDown,
    EngineError,
    InvalidRequest,
    LoadFailed,
    Overloaded,
    ShuttingDown,
)
from runtime.llama.interface import ModelInfo
from runtime.requests import EngineStats, Event, Failed, TextDelta, Work

from .inflight import InflightRequest, InflightRequests, Stream
from .messages import Add, Cancel, Stepped
from .process import EngineProcess, EngineRun

StreamFactory = Callable[[Iterable[str], Callable[[tuple[str, ...]], None]], Stream]
EngineState = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

_TOTALS = tuple(name for name in EngineStats.__struct_fields__ if name.endswith("_total") and name != "kv_cells_total")
_log = logging.getLogger("deskside.worker")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Give up after `deaths` within `window_s` with no answer finished in between.

    A request that kills its engine costs two of them, so two such requests in a row are survived. After the second
    death in a row there is a pause of `pause_s` before the next engine, and of twice as long after each that follows.
    """

    deaths: int = 5
    window_s: float = 60.0
    pause_s: float = 0.5


class RestartLimiter:
    """Counts the engines that ended since one of them finished an answer."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._times_s: deque[float] = deque(maxlen=policy.deaths)

    def note_death(self) -> None:
        """Count an engine that ended."""
        self._times_s.append(time.monotonic())

    def note_answer(self) -> None:
        """Start counting again: the engine works."""
        self._times_s.clear()

    @property
    def exhausted(self) -> bool:
        """True if the restart limit is reached."""
        many = len(self._times_s) == self._policy.deaths
        return many and self._times_s[-1] - self._times_s[0] <= self._policy.window_s

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next engine: none after the first death."""
        repeated = len(self._times_s) - 1
        return self._policy.pause_s * 2.0 ** (repeated - 1) if repeated > 0 else 0.0


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """Bounds of one supervisor: `slots` of the live requests run in the engine, `queue` more may wait.

    An engine ends cancelled requests between two steps; `drain` waits `cancel_s` for that.
    """

    slots: int
    queue: int
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    cancel_s: float = 10.0


class EngineSupervisor:
    """Supervises the engines that `process` launches, one at a time."""

    def __init__(
        self, process: EngineProcess, *, limits: SupervisorLimits, make_stream: StreamFactory = Stream
    ) -> None:
        """Launches nothing yet. `make_stream` makes each call's Stream of the requests' ids and `cancel`."""
        self.capacity = limits.slots + limits.queue
        self._process = process
        self._limits = limits
        self._make_stream = make_stream
        self._state: EngineState = "starting"
        self._fatal: EngineError | None = None
        self._last_cause: str | None = None
        self._engine_run: EngineRun | None = None
        self._engine_ready = False
        self._changed = threading.Condition()
        self._live = InflightRequests(self._changed, self.cancel)
        self._stats = EngineStats()
        self._stats_before: EngineStats | None = None
        self._restart_limiter = RestartLimiter(limits.restarts)
        self._last_sign_s = time.monotonic()
        self._thread = threading.Thread(target=self._run_engines, name="deskside-engine", daemon=True)

    def launch(self) -> None:
        """Start the first engine's process, so that it loads the model while the caller does other work."""
        if self._engine_run is None:
            self._engine_run = self._process.launch()

    def start(self) -> ModelInfo:
        """Wait until the first engine has loaded its model, then take requests. Raises LoadFailed.

        Blocks. Call it once; after an error call `stop`.
        """
        self.launch()
        assert self._engine_run is not None, "launched"
        try:
            ready = self._engine_run.await_ready()
        except EngineDied as error:
            raise LoadFailed(f"{self._process.name!r} cannot be loaded: {error}") from error
        self._stats = ready.stats
        with self._changed:
            if self._state == "starting":
                self._state = "ready"
                self._thread.start()
        return ready.info

    @property
    def state(self) -> EngineState:
        """`ready` and `restarting` accept requests, which wait in the bounded queue until an engine is ready."""
        return self._state

    @property
    def restarts(self) -> int:
        """Engines launched after the first."""
        return self._stats.engine_restarts_total

    @property
    def last_cause(self) -> str | None:
        """The reason why the last engine ended."""
        return self._last_cause

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's last message while requests are live; else 0."""
        return time.monotonic() - self._last_sign_s if self._live else 0.0

    @property
    def live(self) -> int:
        """The number of accepted requests without a terminal event yet."""
        return len(self._live)

    def stats(self) -> EngineStats:
        """The engine's counts after its last step, with the totals of the engines before it."""
        return self._stats

    def require_room(self, count: int = 1) -> None:
        """Raise what `submit` would raise for `count` requests: call it before preparing them."""
        if self._state == "failed":
            raise EngineDown(f"the engine stopped: {self._fatal}") from self._fatal
        if self._state not in ("ready", "restarting"):
            raise ShuttingDown(f"the server takes no requests while it is {self._state}")
        if count > self.capacity:
            message = f"{count} answers in one call, but only {self.capacity} may run and wait; ask for fewer"
            raise InvalidRequest(message, param="n")
        if self.live + count > self.capacity:
            message = f"the queue is full: {self.live} answers are running or waiting, limit {self.capacity}"
            raise Overloaded(message, retry_after_s=self._live.retry_after_s())

    def submit(self, *requests: Work, whole: bool = False) -> Stream:
        """Accept all of `requests`, or none. Call it on the event loop that will read the stream.

        `whole`: deliver nothing of an answer before its end, so that it survives an engine that ends in the middle of
        it. Raises Overloaded, ShuttingDown or EngineDown; InvalidRequest if there are more requests than `capacity`.
        """
        stream = self._make_stream((request.id for request in requests), self.cancel)
        with self._changed:
            self.require_room(len(requests))
            if not self._live:
                self._last_sign_s = time.monotonic()
            self._hand_over(self._live.add(requests, stream, whole=whole))
        return stream

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End those of these requests that are live; each fails with Cancelled."""
        self._end(request_ids, Cancelled("the request was cancelled"))

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, let the live ones finish for `timeout_s`, then fail the rest with ShuttingDown."""
        with self._changed:
            if self._state in ("ready", "restarting"):
                self._state = "draining"
        if not await self._live.wait_empty(timeout_s):
            error = ShuttingDown(f"the server stopped before the answer was finished (it waited {timeout_s:g} s)")
            self._end(tuple(self._live.by_id), error)
            if not await self._live.wait_empty(self._limits.cancel_s):
                self._fail_all(error)

    def stop(self) -> None:
        """End the engine, fail the live requests with ShuttingDown, free the model.

        Blocks until the engine's process has ended, by SIGKILL after a grace period. Stopping twice is harmless, and so
        is stopping before `start`.
        """
        with self._changed:
            if self._state != "failed":
                self._state = "stopped"
            self._changed.notify_all()
            run = self._engine_run
        if run is not None:
            run.stop()
        if self._thread.ident is not None:
            self._thread.join()
        if run is not None:
            run.close()

    def _run_engines(self) -> None:
        while True:
            try:
                self._supervise()
                break
            except Exception as error:  # noqa: BLE001 - no error may leave a caller waiting
                if not self._recover(error):
                    break
        self._fail_all(self._fatal or ShuttingDown("the server stopped before the answer was finished"))

    def _supervise(self) -> None:
        """Run one engine to its end. Returns once the supervisor is stopped; raises what ended the engine."""
        run = self._engine_run or self._relaunch()
        if run is None:
            return
        ready = run.await_ready()
        if self.restarts:
            _log.warning("engine number %d is ready", self.restarts + 1)
        with self._changed:
            if self._state in ("starting", "restarting"):
                self._state = "ready"
            self._engine_ready = True
            self._hand_over(self._live.by_id.values())
        self._note(ready.stats)
        while (stepped := run.receive()) is not None:
            self._deliver(stepped)

    def _relaunch(self) -> EngineRun | None:
        run = self._process.launch()
        with self._changed:
            if self._state != "stopped":
                self._engine_run = run
                return run
        run.stop()
        run.close()
        return None

    def _recover(self, error: Exception) -> bool:
        """Fail the requests that end with the engine that `error` ended. False if no engine is to follow it."""
        ours = error if isinstance(error, EngineError) else EngineDown(f"the engine stopped: {error!r}")
        with self._changed:
            run, self._engine_ready = self._engine_run, False
            if self._state == "stopped":
                return False
            _log.error("the engine ended: %s", error, exc_info=None if isinstance(error, EngineError) else error)
            self._last_cause = str(ours)
            self._stats = replace(self._stats, running=0, waiting=0, kv_cells_used=0)
            self._restart_limiter.note_death()
            if isinstance(error, LoadFailed) or self._restart_limiter.exhausted:
                # Set before the last events are delivered: their readers then see that no engine follows.
                self._state, self._fatal = "failed", ours
                return False
            if self._state == "ready":
                self._state = "restarting"
            self._engine_run = None
            ends = [Failed(n, e) for n, entry in self._live.by_id.items() if (e := entry.end_with_engine(ours))]
        self._live.deliver(ends)
        if run is not None:
            run.stop()
            run.close()
        restarts = self._stats.engine_restarts_total + 1
        self._stats_before = replace(self._stats, engine_restarts_total=restarts)
        self._stats = self._stats_before
        return self._pause()

    def _pause(self) -> bool:
        """Wait before the next engine. False if the supervisor was stopped meanwhile."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._state == "stopped", self._restart_limiter.pause_s)

    def _hand_over(self, entries: Iterable[InflightRequest]) -> None:
        """Send requests to the engine if it is ready; else they wait for the next one. Call it with the lock held."""
        if not self._engine_ready or self._engine_run is None:
            return
        messages = []
        for entry in entries:
            entry.engines += 1
            messages.append(Add(entry.request))
        if messages:
            self._engine_run.send(messages)

    def _end(self, request_ids: Iterable[str], error: Exception) -> None:
        """Have the engine end these requests; while there is none, end them here."""
        with self._changed:
            entries = [self._live.by_id[name] for name in request_ids if name in self._live.by_id]
            ids = tuple(entry.request.id for entry in entries if entry.ending is None)
            for entry in entries:
                entry.ending = entry.ending or error
            if self._engine_ready and self._engine_run is not None:
                if ids:
                    self._engine_run.send([Cancel(ids, error)])
                return
        self._live.deliver([Failed(name, error) for name in ids])

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            events: list[Event] = [Failed(name, entry.ending or error) for name, entry in self._live.by_id.items()]
        self._live.deliver(events)

    def _deliver(self, stepped: Stepped) -> None:
        self._note(stepped.stats)
        self._live.deliver(stepped.events)
        if any(not isinstance(event, TextDelta | Failed) for event in stepped.events):
            self._restart_limiter.note_answer()

    def _note(self, stats: EngineStats) -> None:
        self._last_sign_s = time.monotonic()
        self._stats = stats if self._stats_before is None else _summed(self._stats_before, stats)


def _summed(before: EngineStats, now: EngineStats) -> EngineStats:
    """The counts of `now`, with the totals of the engines that ran before it."""
    return replace(now, **{name: getattr(before, name) + getattr(now, name) for name in _TOTALS})
