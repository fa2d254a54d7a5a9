"""The supervisor of one engine: everyone else submits requests to it; events come back to their own event loops.

Every accepted request ends in exactly one terminal event: the engine's, or the supervisor's own when the engine is
gone. An engine that ends is followed by another one: a request of which nothing was heard is given to that one too,
once; the others fail. What waits is bounded: at most `slots + queue` requests are live.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from runtime.errors import Cancelled, EngineDown, EngineError, InvalidRequest, LoadFailed, Overloaded, ShuttingDown
from runtime.requests import EngineStats, Event, Failed, TextDelta, Work

from .inflight import InflightRequest, InflightRequests, Stream
from .messages import Add, Cancel, EngineLike, Stepped, summed
from .process import EngineHost, EngineRun, ThreadHost


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
    """The engines that ended since one of them finished an answer."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._times_s: deque[float] = deque(maxlen=policy.deaths)

    def note(self) -> None:
        """One more."""
        self._times_s.append(time.monotonic())

    def forget(self) -> None:
        """An answer was finished: the engine can work."""
        self._times_s.clear()

    @property
    def exhausted(self) -> bool:
        """Whether engines end one after the other and finish nothing."""
        many = len(self._times_s) == self._policy.deaths
        return many and self._times_s[-1] - self._times_s[0] <= self._policy.window_s

    @property
    def pause_s(self) -> float:
        """How long to wait before the next engine: not at all after the first death."""
        repeated = len(self._times_s) - 1
        return self._policy.pause_s * 2.0 ** (repeated - 1) if repeated > 0 else 0.0


State = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

# For an engine to end requests that it was told to end. It does so between two steps.
CANCEL_SECONDS = 10.0

_log = logging.getLogger("deskside.worker")


class EngineSupervisor:
    """Supervises an engine. `slots` of the live requests run, `queue` more may wait.

    An `EngineHost` says where its engines run; an engine itself runs in the own thread here, and has no follower.
    """

    def __init__(
        self, engine: EngineLike | EngineHost, *, queue: int, slots: int, policy: RestartPolicy | None = None
    ) -> None:
        """Waits until the first engine has loaded its model. Raises LoadFailed or EngineDied."""
        self.capacity = slots + queue
        self._host = engine if isinstance(engine, EngineHost) else ThreadHost(engine)
        self._state: State = "starting"
        self._fatal: EngineError | None = None
        self._last_cause: str | None = None
        self._engine_run: EngineRun | None = self._host.launch()
        self._takes = False
        self._changed = threading.Condition()
        self._live = InflightRequests(self._changed, self.cancel)
        self._stats = self._engine_run.await_ready()
        self._stats_before: EngineStats | None = None
        self._restart_limiter = RestartLimiter(policy or RestartPolicy())
        self._last_sign_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="deskside-engine", daemon=True)

    @property
    def state(self) -> State:
        """`ready` and `restarting` take requests: until the next engine is there they wait, in the bounded queue."""
        return self._state

    @property
    def restarts(self) -> int:
        """How many engines followed the first."""
        return self._stats.engine_restarts_total

    @property
    def last_cause(self) -> str | None:
        """Why the last engine that ended did so."""
        return self._last_cause

    @property
    def silent_s(self) -> float:
        """Seconds since the engine gave a sign, if it has work; else 0."""
        return time.monotonic() - self._last_sign_s if self._live else 0.0

    @property
    def live(self) -> int:
        """Accepted requests whose terminal event is still to come."""
        return len(self._live)

    def start(self) -> None:
        """Begin to take requests."""
        self._state = "ready"
        self._thread.start()

    def stats(self) -> EngineStats:
        """What the engine held after its last step, with the totals of those before it."""
        return self._stats

    def require_room(self, count: int = 1) -> None:
        """Raise what `submit` would raise for `count` requests, so that no work is done for what must be refused."""
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
        """Accept all of `requests`, or none. Call it on the event loop that is to read the stream.

        `whole`: the reader has no use for parts of an answer, so they come with its end, and the answer survives an
        engine that ends in the middle of it. Raises Overloaded, ShuttingDown or EngineDown; InvalidRequest if so many
        can never be accepted.
        """
        stream = Stream((request.id for request in requests), self.cancel)
        with self._changed:
            self.require_room(len(requests))
            if not self._live:
                self._last_sign_s = time.monotonic()
            self._hand_over(self._live.add(requests, stream, whole=whole))
        return stream

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ask for the end of these requests, those that are still live; each fails with Cancelled."""
        self._end(request_ids, Cancelled("the request was cancelled"))

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let the live ones finish for `timeout_s`, then fail the rest with ShuttingDown."""
        with self._changed:
            if self._state in ("ready", "restarting"):
                self._state = "draining"
        if not await self._live.wait_empty(timeout_s):
            error = ShuttingDown(f"the server stopped before the answer was finished (it waited {timeout_s:g} s)")
            self._end(tuple(self._live.by_id), error)
            if not await self._live.wait_empty(CANCEL_SECONDS):
                self._fail_all(error)

    def stop(self) -> None:
        """End the engine, fail what is still live with ShuttingDown, free the model.

        An engine in this thread finishes the step in progress; a process is killed if it does not leave.
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

    def _run(self) -> None:
        while True:
            try:
                self._supervise()
                break
            except Exception as error:  # noqa: BLE001 - whatever it was, nobody may be left waiting
                if not self._recover(error):
                    break
        self._fail_all(self._fatal or ShuttingDown("the server stopped before the answer was finished"))

    def _supervise(self) -> None:
        """See one engine through. Returns once the supervisor is stopped; raises what ended the engine."""
        run = self._engine_run or self._relaunch()
        if run is None:
            return
        stats = run.await_ready()
        if self.restarts:
            _log.warning("engine number %d is ready", self.restarts + 1)
        with self._changed:
            if self._state in ("starting", "restarting"):
                self._state = "ready"
            self._takes = True
            self._hand_over(self._live.by_id.values())
        self._note(stats)
        while (stepped := run.receive()) is not None:
            self._take(stepped)

    def _relaunch(self) -> EngineRun | None:
        run = self._host.launch()
        with self._changed:
            if self._state != "stopped":
                self._engine_run = run
                return run
        run.stop()
        run.close()
        return None

    def _recover(self, error: Exception) -> bool:
        """The engine ended: fail the requests that cannot go on. False if no engine is to follow."""
        ours = error if isinstance(error, EngineError) else EngineDown(f"the engine stopped: {error!r}")
        with self._changed:
            run, self._takes = self._engine_run, False
            if self._state == "stopped":
                return False
            _log.error("the engine ended: %s", error, exc_info=None if isinstance(error, EngineError) else error)
            self._last_cause = str(ours)
            self._stats = replace(self._stats, running=0, waiting=0, kv_cells_used=0)
            self._restart_limiter.note()
            if not self._host.relaunches or isinstance(error, LoadFailed) or self._restart_limiter.exhausted:
                # Before any request hears of it: who gets an engine's last events can tell that no more will come.
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
        """Give requests to the engine, if it takes any now; else they wait for the next. Call it with the lock held."""
        if not self._takes or self._engine_run is None:
            return
        messages = []
        for entry in entries:
            entry.engines += 1
            messages.append(Add(entry.request))
        if messages:
            self._engine_run.send(messages)

    def _end(self, request_ids: Iterable[str], error: Exception) -> None:
        """Have the engine end these requests; if there is none at the moment, end them here."""
        with self._changed:
            entries = [self._live.by_id[name] for name in request_ids if name in self._live.by_id]
            ids = tuple(entry.request.id for entry in entries if entry.ending is None)
            for entry in entries:
                entry.ending = entry.ending or error
            if self._takes and self._engine_run is not None:
                if ids:
                    self._engine_run.send([Cancel(ids, error)])
                return
        self._live.deliver([Failed(name, error) for name in ids])

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            events: list[Event] = [Failed(name, entry.ending or error) for name, entry in self._live.by_id.items()]
        self._live.deliver(events)

    def _take(self, stepped: Stepped) -> None:
        self._note(stepped.stats)
        self._live.deliver(stepped.events)
        if any(not isinstance(event, TextDelta | Failed) for event in stepped.events):
            self._restart_limiter.forget()

    def _note(self, stats: EngineStats) -> None:
        self._last_sign_s = time.monotonic()
        self._stats = stats if self._stats_before is None else summed(self._stats_before, stats)
