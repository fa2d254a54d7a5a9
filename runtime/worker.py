"""The supervisor of one engine: everyone else submits requests to it; events come back to their own event loops.

Every accepted request ends in exactly one terminal event: the engine's, or the supervisor's own when the engine is
gone. An engine that ends is followed by another one: a request of which nothing was heard is given to that one too,
once; the others fail. What waits is bounded: at most `slots + queue` requests are live.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from .errors import Cancelled, EngineDown, EngineError, InvalidRequest, LoadFailed, Overloaded, ShuttingDown
from .sequence import EngineStats, Event, Failed, TextDelta, Work
from .worker_host import EngineHost, Life, ThreadHost
from .worker_protocol import Add, Cancel, EngineLike, Stepped, summed
from .worker_stream import Stream, put_all

State = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]

MAX_RETRY_AFTER_S = 60
# How much the newest interval between two finished requests counts in their running mean.
PACE_WEIGHT = 0.1
# For an engine to end requests that it was told to end. It does so between two steps.
CANCEL_SECONDS = 10.0
# A request that was with so many engines when they ended is not given to another one.
MAX_ENGINES = 2

_log = logging.getLogger("deskside.worker")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When to give up: after `deaths` within `window_s` with no answer finished in between.

    A request that kills its engine costs two of them, so two such requests in a row are survived. After the second
    death in a row there is a pause of `pause_s`, and of twice as long after each that follows.
    """

    deaths: int = 5
    window_s: float = 60.0
    pause_s: float = 0.5


@dataclass(slots=True)
class _Entry:
    """A live request. `engines` were given it; `heard` says whether its reader got anything; `ending` is why it must
    end early. Of a `whole` answer the reader gets nothing before the end: until then its events are `held`."""

    request: Work
    stream: Stream
    whole: bool
    engines: int = 0
    heard: bool = False
    ending: Exception | None = None
    held: list[Event] = field(default_factory=list)


class Worker:
    """Supervises an engine. `slots` of the live requests run, `queue` more may wait.

    An `EngineHost` says where its engines run; an engine itself runs in the worker's own thread, and has no follower.
    """

    def __init__(
        self, engine: EngineLike | EngineHost, *, queue: int, slots: int, policy: RestartPolicy | None = None
    ) -> None:
        """Waits until the first engine has loaded its model. Raises LoadFailed or EngineDied."""
        self.capacity = slots + queue
        self._host = engine if isinstance(engine, EngineHost) else ThreadHost(engine)
        self._policy = policy or RestartPolicy()
        self._state: State = "starting"
        self._fatal: EngineError | None = None
        self._last_cause: str | None = None
        self._life: Life | None = self._host.launch()
        self._takes = False
        self._live: dict[str, _Entry] = {}
        self._changed = threading.Condition()
        self._emptied: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._stats = self._life.await_ready()
        self._stats_before: EngineStats | None = None
        self._deaths: deque[float] = deque(maxlen=self._policy.deaths)
        self._heard_s = time.monotonic()
        self._pace_s = 0.0
        self._last_end_s = time.monotonic()
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
        return time.monotonic() - self._heard_s if self._live else 0.0

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
            raise Overloaded(message, retry_after_s=self._retry_after_s())

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
                self._last_end_s = self._heard_s = time.monotonic()
            entries = []
            for request in requests:
                if request.id in self._live:
                    raise InvalidRequest(f"a request of id {request.id!r} is live already")
                self._live[request.id] = entry = _Entry(request, stream, whole)
                entries.append(entry)
            self._hand_over(entries)
        return stream

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ask for the end of these requests, those that are still live; each fails with Cancelled."""
        self._end(request_ids, Cancelled("the request was cancelled"))

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let the live ones finish for `timeout_s`, then fail the rest with ShuttingDown."""
        with self._changed:
            if self._state in ("ready", "restarting"):
                self._state = "draining"
        if not await self._wait_empty(timeout_s):
            error = ShuttingDown(f"the server stopped before the answer was finished (it waited {timeout_s:g} s)")
            self._end(tuple(self._live), error)
            if not await self._wait_empty(CANCEL_SECONDS):
                self._fail_all(error)

    async def _wait_empty(self, timeout_s: float) -> bool:
        emptied = asyncio.Event()
        with self._changed:
            if not self._live:
                return True
            self._emptied.append((asyncio.get_running_loop(), emptied))
        try:
            await asyncio.wait_for(emptied.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """End the engine, fail what is still live with ShuttingDown, free the model.

        In the worker's own thread an engine finishes the step in progress; a process is killed if it does not leave.
        """
        with self._changed:
            if self._state != "failed":
                self._state = "stopped"
            self._changed.notify_all()
            life = self._life
        if life is not None:
            life.stop()
        if self._thread.ident is not None:
            self._thread.join()
        if life is not None:
            life.close()

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
        """See one engine through. Returns once the worker is stopped; raises what ended the engine."""
        life = self._life or self._relaunch()
        if life is None:
            return
        stats = life.await_ready()
        with self._changed:
            if self._state in ("starting", "restarting"):
                self._state = "ready"
            self._takes = True
            self._hand_over(self._live.values())
        self._note(stats)
        while (stepped := life.receive()) is not None:
            self._take(stepped)

    def _relaunch(self) -> Life | None:
        life = self._host.launch()
        with self._changed:
            if self._state != "stopped":
                self._life = life
                return life
        life.stop()
        life.close()
        return None

    def _recover(self, error: Exception) -> bool:
        """The engine ended: fail the requests that cannot go on. False if no engine is to follow."""
        ours = error if isinstance(error, EngineError) else EngineDown(f"the engine stopped: {error!r}")
        with self._changed:
            life, self._takes = self._life, False
            if self._state == "stopped":
                return False
            _log.error("the engine ended: %s", error, exc_info=None if isinstance(error, EngineError) else error)
            self._last_cause = str(ours)
            self._deaths.append(time.monotonic())
            if not self._host.relaunches or isinstance(error, LoadFailed) or self._is_hopeless():
                # Before any request hears of it: who gets an engine's last events can tell that no more will come.
                self._state, self._fatal = "failed", ours
                return False
            if self._state == "ready":
                self._state = "restarting"
            self._life = None
            casualties = [Failed(name, cause) for name, entry in self._live.items() if (cause := _fate(entry, ours))]
        self._deliver(casualties)
        if life is not None:
            life.stop()
            life.close()
        self._stats_before = replace(
            self._stats,
            running=0,
            waiting=0,
            kv_cells_used=0,
            engine_restarts_total=self._stats.engine_restarts_total + 1,
        )
        self._stats = self._stats_before
        return self._pause()

    def _is_hopeless(self) -> bool:
        """Whether engines end one after the other and finish nothing."""
        many = len(self._deaths) == self._policy.deaths
        return many and self._deaths[-1] - self._deaths[0] <= self._policy.window_s

    def _pause(self) -> bool:
        """Wait before the next engine, the longer the more have ended in a row. False if the worker was stopped."""
        repeated = len(self._deaths) - 1
        seconds = self._policy.pause_s * 2 ** (repeated - 1) if repeated else 0.0
        with self._changed:
            return not self._changed.wait_for(lambda: self._state == "stopped", seconds)

    def _hand_over(self, entries: Iterable[_Entry]) -> None:
        """Give requests to the engine, if it takes any now; else they wait for the next. Call it with the lock held."""
        if not self._takes or self._life is None:
            return
        messages = []
        for entry in entries:
            entry.engines += 1
            messages.append(Add(entry.request))
        if messages:
            self._life.send(messages)

    def _end(self, request_ids: Iterable[str], error: Exception) -> None:
        """Have the engine end these requests; if there is none at the moment, end them here."""
        with self._changed:
            entries = [self._live[name] for name in request_ids if name in self._live]
            ids = tuple(entry.request.id for entry in entries if entry.ending is None)
            for entry in entries:
                entry.ending = entry.ending or error
            if self._takes and self._life is not None:
                if ids:
                    self._life.send([Cancel(ids, error)])
                return
        self._deliver([Failed(name, error) for name in ids])

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            events: list[Event] = [Failed(name, entry.ending or error) for name, entry in self._live.items()]
        self._deliver(events)

    def _take(self, stepped: Stepped) -> None:
        self._note(stepped.stats)
        self._deliver(stepped.events)
        if any(not isinstance(event, TextDelta | Failed) for event in stepped.events):
            self._deaths.clear()

    def _note(self, stats: EngineStats) -> None:
        self._heard_s = time.monotonic()
        self._stats = stats if self._stats_before is None else summed(self._stats_before, stats)

    def _deliver(self, events: Iterable[Event]) -> None:
        """Hand the events of a step over: one call for each event loop, whatever the number of streams."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        with self._changed:
            for event in events:
                entry = self._live.get(event.request_id)
                if entry is None:
                    continue
                if entry.whole:
                    entry.held.append(event)
                else:
                    entry.heard = True
                if not isinstance(event, TextDelta):
                    self._retire(event.request_id)
                elif entry.whole:
                    continue
                handed = by_loop.setdefault(entry.stream.loop, [])
                handed += [(entry.stream, held) for held in entry.held or (event,)]
            emptied, self._emptied = (self._emptied, []) if not self._live else ([], self._emptied)
        for loop, handed in by_loop.items():
            self._call(loop, handed)
        for loop, empty in emptied:
            with contextlib.suppress(RuntimeError):  # closed: nobody waits any more
                loop.call_soon_threadsafe(empty.set)

    def _call(self, loop: asyncio.AbstractEventLoop, handed: list[tuple[Stream, Event]]) -> None:
        try:
            loop.call_soon_threadsafe(put_all, handed)
        except RuntimeError:  # the loop is closed: nobody reads these answers any more
            self.cancel(tuple({event.request_id for _, event in handed}))

    def _retire(self, request_id: str) -> None:
        del self._live[request_id]
        now = time.monotonic()
        interval, self._last_end_s = now - self._last_end_s, now
        self._pace_s += PACE_WEIGHT * (interval - self._pace_s)

    def _retry_after_s(self) -> int:
        """Until a tenth of the live requests have finished, at the pace of late."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._pace_s * self.live / 10)))


def _fate(entry: _Entry, error: EngineError) -> Exception | None:
    """Why a request ends with the engine that had it; None if the next one is to answer it."""
    if entry.ending is not None or entry.heard or entry.engines >= MAX_ENGINES:
        return entry.ending or error
    entry.held.clear()
    return None
