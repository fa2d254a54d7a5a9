"""The one thread that owns the engine. Everyone else sends it messages; events come back to their own event loops.

Every accepted request ends in exactly one terminal event: the engine's, or the worker's own when the engine is gone.
What waits is bounded: at most `slots + queue` requests are live.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol

from .errors import Cancelled, EngineDown, EngineError, InvalidRequest, Overloaded, ShuttingDown
from .sequence import EngineStats, Event, Failed, TextDelta, Work
from .worker_stream import Stream, put_all

State = Literal["starting", "ready", "draining", "stopped", "failed"]

MAX_RETRY_AFTER_S = 60
# How much the newest interval between two finished requests counts in their running mean.
PACE_WEIGHT = 0.1

_log = logging.getLogger("deskside.worker")


class EngineLike(Protocol):
    """What the worker needs of an engine; it calls nothing else, and only from its own thread."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def failure(self) -> Exception | None:
        """The fatal error that ended the engine, if one did."""

    def add(self, request: Work) -> None:
        """Take a request in."""

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request; its terminal event if it was live."""

    def step(self) -> list[Event]:
        """Compute one step."""

    def stats(self) -> EngineStats:
        """What the engine holds."""

    def close(self) -> None:
        """Free the model."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: Work


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_ids: tuple[str, ...]
    error: Exception | None = None


class Worker:
    """Runs an engine in a thread of its own. `slots` of the live requests run, `queue` more may wait."""

    def __init__(self, engine: EngineLike, *, queue: int, slots: int) -> None:
        self.capacity = slots + queue
        self._engine = engine
        self._state: State = "starting"
        self._fatal: BaseException | None = None
        self._inbox: deque[_Add | _Cancel] = deque()
        self._live: dict[str, Stream] = {}
        self._changed = threading.Condition()
        self._emptied: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._stats = engine.stats()
        self._pace_s = 0.0
        self._last_end_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="deskside-engine", daemon=True)

    @property
    def state(self) -> State:
        """Only `ready` takes requests."""
        return self._state

    @property
    def live(self) -> int:
        """Accepted requests whose terminal event is still to come."""
        return len(self._live)

    def start(self) -> None:
        """Begin to take requests."""
        self._state = "ready"
        self._thread.start()

    def stats(self) -> EngineStats:
        """What the engine held after its last step."""
        return self._stats

    def require_room(self, count: int = 1) -> None:
        """Raise what `submit` would raise for `count` requests, so that no work is done for what must be refused."""
        if self._state == "failed":
            raise EngineDown(f"the engine stopped: {self._fatal}") from self._fatal
        if self._state != "ready":
            raise ShuttingDown(f"the server takes no requests while it is {self._state}")
        if count > self.capacity:
            message = f"{count} answers in one call, but only {self.capacity} may run and wait; ask for fewer"
            raise InvalidRequest(message, param="n")
        if self.live + count > self.capacity:
            message = f"the queue is full: {self.live} answers are running or waiting, limit {self.capacity}"
            raise Overloaded(message, retry_after_s=self._retry_after_s())

    def submit(self, *requests: Work) -> Stream:
        """Accept all of `requests`, or none. Call it on the event loop that is to read the stream.

        Raises Overloaded, ShuttingDown or EngineDown; InvalidRequest if so many can never be accepted.
        """
        stream = Stream((request.id for request in requests), self.cancel)
        with self._changed:
            self.require_room(len(requests))
            if not self._live:
                self._last_end_s = time.monotonic()
            for request in requests:
                if request.id in self._live:
                    raise InvalidRequest(f"a request of id {request.id!r} is live already")
                self._live[request.id] = stream
                self._inbox.append(_Add(request))
            self._changed.notify()
        return stream

    def cancel(self, request_ids: tuple[str, ...]) -> None:
        """Ask for the end of these requests, those that are still live; each fails with Cancelled."""
        with self._changed:
            live = tuple(request_id for request_id in request_ids if request_id in self._live)
            if live:
                self._inbox.append(_Cancel(live))
                self._changed.notify()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, let the live ones finish for `timeout_s`, then fail the rest with ShuttingDown."""
        with self._changed:
            if self._state == "ready":
                self._state = "draining"
        if not await self._wait_empty(timeout_s):
            error = ShuttingDown(f"the server stopped before the answer was finished (it waited {timeout_s:g} s)")
            with self._changed:
                self._inbox.append(_Cancel(tuple(self._live), error))
                self._changed.notify()
            await self._wait_empty(None)

    async def _wait_empty(self, timeout_s: float | None) -> bool:
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
        """End the thread, fail what is still live with ShuttingDown, free the model. Waits for the step in progress."""
        with self._changed:
            if self._state != "failed":
                self._state = "stopped"
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self._engine.close()

    def _run(self) -> None:
        try:
            while self._state in ("ready", "draining"):
                self._deliver(self._take_messages())
                if self._engine.has_work:
                    events = self._engine.step()
                    if self._engine.failure is not None:
                        self._mark_failed(self._engine.failure)
                    self._deliver(events)
                self._stats = self._engine.stats()
                if self._engine.failure is not None:
                    raise self._engine.failure
            self._fail_all(ShuttingDown("the server stopped before the answer was finished"))
        except Exception as error:  # noqa: BLE001 - whatever broke the engine, nobody may be left waiting
            self._break_down(error)

    def _break_down(self, error: Exception) -> None:
        _log.critical("the engine stopped: %s", error, exc_info=error)
        self._mark_failed(error)
        self._fail_all(error if isinstance(error, EngineError) else EngineDown(f"the engine stopped: {error!r}"))

    def _mark_failed(self, error: BaseException) -> None:
        """Before any request hears of it: who gets an engine's last events can tell that there will be no more."""
        with self._changed:
            self._state, self._fatal = "failed", error

    def _take_messages(self) -> list[Event]:
        """Handle the inbox, after waiting for it if the engine has nothing to do; the events that come of it."""
        with self._changed:
            while not self._inbox and not self._engine.has_work and self._state in ("ready", "draining"):
                self._changed.wait()
            messages = list(self._inbox)
            self._inbox.clear()
        events: list[Event] = []
        for message in messages:
            events += self._add(message.request) if isinstance(message, _Add) else self._cancel(message)
        return events

    def _add(self, request: Work) -> list[Event]:
        try:
            self._engine.add(request)
        except Exception as error:  # noqa: BLE001 - a request the engine cannot take harms no other
            _log.exception("the engine refused request %r", request.id)
            return [Failed(request.id, error)]
        return []

    def _cancel(self, message: _Cancel) -> list[Event]:
        events: list[Event] = []
        for request_id in message.request_ids:
            self._engine.cancel(request_id)
            events.append(Failed(request_id, message.error or Cancelled("the request was cancelled")))
        return events

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            self._inbox.clear()
            events: list[Event] = [Failed(request_id, error) for request_id in self._live]
        self._deliver(events)

    def _deliver(self, events: list[Event]) -> None:
        """Hand the events of a step over: one call for each event loop, whatever the number of streams."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        with self._changed:
            for event in events:
                stream = self._live.get(event.request_id)
                if stream is None:
                    continue
                if not isinstance(event, TextDelta):
                    self._retire(event.request_id)
                by_loop.setdefault(stream.loop, []).append((stream, event))
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
