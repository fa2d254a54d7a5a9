"""Accepted requests that have not ended, and the delivery of their events to the event loops that wait for them."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

from runtime.errors import InvalidRequest
from runtime.requests import Event, TextDelta, Work


class Stream:
    """The events of the requests of one call, merged. An async iterator that ends after the last terminal event."""

    def __init__(self, request_ids: Iterable[str], cancel: Callable[[tuple[str, ...]], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._open = set(request_ids)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._accepted_s = time.monotonic()
        self.on_first_token: Callable[[float], None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._open:
            raise StopAsyncIteration
        event = await self._events.get()
        if not isinstance(event, TextDelta):
            self._open.discard(event.request_id)
        return event

    @property
    def ready(self) -> bool:
        """True if the next event, or the end, is there without waiting."""
        return not self._open or not self._events.empty()

    def put(self, event: Event) -> None:
        """Add an event; on the stream's own loop only. The first text reports the seconds since acceptance."""
        if self.on_first_token is not None and isinstance(event, TextDelta):
            report, self.on_first_token = self.on_first_token, None
            report(time.monotonic() - self._accepted_s)
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """End the requests of the stream: each that is live fails with Cancelled. Calling twice is harmless."""
        if self._open:
            self._cancel(tuple(self._open))


def put_all(handed: Iterable[tuple[Stream, Event]]) -> None:
    """Add many events to their streams; on the loop they share."""
    for stream, event in handed:
        stream.put(event)


@contextmanager
def cancelling(stream: Stream) -> Iterator[None]:
    """Cancel the stream's live requests if its reader fails or is cancelled."""
    try:
        yield
    except (Exception, asyncio.CancelledError):
        stream.cancel()
        raise


MAX_RETRY_AFTER_S = 60
# Weight of the newest interval between two finished requests in their running mean.
PACE_WEIGHT = 0.1
# A request that this many engines had when they ended is not given to another one.
MAX_ENGINES = 2


@dataclass(slots=True)
class InflightRequest:
    """An accepted request. `engines` counts those it was sent to; `delivered` is set once its reader got an event.

    `ending` is the error of a request that must end early. The events of a `whole` answer are `held` until it ends.
    """

    request: Work
    stream: Stream
    whole: bool
    engines: int = 0
    delivered: bool = False
    ending: Exception | None = None
    held: list[Event] = field(default_factory=list)

    def end_with_engine(self, error: Exception) -> Exception | None:
        """The error of a request that ends with its engine, which ended by `error`; None if the next one answers it."""
        if self.ending is not None or self.delivered or self.engines >= MAX_ENGINES:
            return self.ending or error
        self.held.clear()
        return None


class InflightRequests:
    """The inflight requests by id. `changed` guards them; `on_lost` gets the ids of those with a closed event loop."""

    def __init__(self, changed: threading.Condition, on_lost: Callable[[tuple[str, ...]], None]) -> None:
        self.by_id: dict[str, InflightRequest] = {}
        self._changed = changed
        self._on_lost = on_lost
        self._emptied: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._pace_s = 0.0
        self._last_end_s = time.monotonic()

    def __len__(self) -> int:
        return len(self.by_id)

    def add(self, requests: Sequence[Work], stream: Stream, *, whole: bool) -> list[InflightRequest]:
        """Add all of them. Raises InvalidRequest, and adds none, if one is live already."""
        added: dict[str, InflightRequest] = {}
        for request in requests:
            if request.id in self.by_id or request.id in added:
                raise InvalidRequest(f"a request of id {request.id!r} is live already")
            added[request.id] = InflightRequest(request, stream, whole)
        if not self.by_id:
            self._last_end_s = time.monotonic()
        self.by_id |= added
        return list(added.values())

    def deliver(self, events: Iterable[Event]) -> None:
        """Deliver the events of a step: one call for each event loop, for any number of streams."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}
        with self._changed:
            for event in events:
                entry = self.by_id.get(event.request_id)
                if entry is not None and (ready := self._deliverable(entry, event)):
                    by_loop.setdefault(entry.stream.loop, []).extend((entry.stream, event) for event in ready)
            emptied, self._emptied = (self._emptied, []) if not self.by_id else ([], self._emptied)
        for loop, handed in by_loop.items():
            self._call(loop, handed)
        for loop, empty in emptied:
            with suppress(RuntimeError):  # closed, and the waiter with it
                loop.call_soon_threadsafe(empty.set)

    def _deliverable(self, entry: InflightRequest, event: Event) -> list[Event]:
        """Events to deliver for `event`; those of a whole answer are held until it ends."""
        if not isinstance(event, TextDelta):
            self._retire(event.request_id)
        elif entry.whole:
            entry.held.append(event)
            return []
        entry.delivered = True
        return [*entry.held, event]

    def _retire(self, request_id: str) -> None:
        del self.by_id[request_id]
        now = time.monotonic()
        interval, self._last_end_s = now - self._last_end_s, now
        self._pace_s += PACE_WEIGHT * (interval - self._pace_s)

    def _call(self, loop: asyncio.AbstractEventLoop, handed: list[tuple[Stream, Event]]) -> None:
        try:
            loop.call_soon_threadsafe(put_all, handed)
        except RuntimeError:  # the loop is closed, and the readers with it
            self._on_lost(tuple({event.request_id for _, event in handed}))

    async def wait_empty(self, timeout_s: float) -> bool:
        """Wait until all have ended. Returns False if that takes longer than `timeout_s`."""
        emptied = asyncio.Event()
        with self._changed:
            if not self.by_id:
                return True
            self._emptied.append((asyncio.get_running_loop(), emptied))
        try:
            await asyncio.wait_for(emptied.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def retry_after_s(self) -> int:
        """Seconds until a tenth of the live requests have finished, at the recent pace."""
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._pace_s * len(self.by_id) / 10)))
