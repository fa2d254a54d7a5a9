"""A call's events on their way from the engine's thread to the reader.

A stream holds at most `max_tokens + 1` events of each request, so a reader that stalls costs the engine no time, and
the server no memory beyond the answer itself.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from .errors import Cancelled
from .sequence import Event, Failed, TextDelta

AnyEvent = TypeVar("AnyEvent", bound=Event)


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
        """Whether the next event, or the end, comes without waiting."""
        return not self._open or not self._events.empty()

    def put(self, event: Event) -> None:
        """Hand in an event; on the stream's own loop only. The first text reports the seconds since acceptance."""
        if self.on_first_token is not None and isinstance(event, TextDelta):
            report, self.on_first_token = self.on_first_token, None
            report(time.monotonic() - self._accepted_s)
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """Ask for an early end. Each request that is still live fails with Cancelled; calling twice is harmless."""
        self._cancel(tuple(self._open))


def put_all(handed: Iterable[tuple[Stream, Event]]) -> None:
    """Hand many events to their streams at once; on the loop they share."""
    for stream, event in handed:
        stream.put(event)


@contextmanager
def cancelling(stream: Stream) -> Iterator[None]:
    """Cancel what the stream still waits for if its reader fails or is cancelled."""
    try:
        yield
    except (Exception, asyncio.CancelledError):
        stream.cancel()
        raise


async def only_event(stream: Stream, kind: type[AnyEvent]) -> AnyEvent:
    """The one event, a `kind`, of a stream of a single request. Raises the request's error if it failed."""
    with cancelling(stream):
        async for event in stream:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, kind):
                return event
    raise Cancelled("the stream ended without an answer")
