"""The engine's own loop: messages in, a step, events out. It knows neither event loops nor processes."""

import logging
import threading
from collections import deque
from collections.abc import Iterable

from .sequence import Event, Failed
from .worker_protocol import Add, EngineLike, Stepped, ToEngine

_log = logging.getLogger("deskside.worker")


class Inbox:
    """Messages from any thread to the one that runs the engine."""

    def __init__(self) -> None:
        self._messages: deque[ToEngine] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, messages: Iterable[ToEngine]) -> None:
        """Leave messages. Never waits."""
        with self._changed:
            self._messages.extend(messages)
            self._changed.notify()

    def close(self) -> None:
        """No more messages: the loop is to end."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, *, wait: bool) -> list[ToEngine] | None:
        """All messages there are; if there are none and `wait`, once one comes. None after `close`."""
        with self._changed:
            while wait and not self._messages and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            messages = list(self._messages)
            self._messages.clear()
        return messages


class EngineLoop:
    """Runs an engine. One thread calls `turn`, over and over."""

    def __init__(self, engine: EngineLike, inbox: Inbox) -> None:
        self._engine = engine
        self._inbox = inbox

    def turn(self) -> Stepped | None:
        """Handle what was sent, then compute a step; waits while there is nothing to do. None once told to stop.

        Raises the engine's fatal error, with no event of that step: whoever reads them knows which requests are left.
        """
        messages = self._inbox.take(wait=not self._engine.has_work)
        if messages is None:
            return None
        events = [event for message in messages for event in self._handle(message)]
        if not events and self._engine.has_work:
            events = self._engine.step()
            if self._engine.failure is not None:
                raise self._engine.failure
        return Stepped(tuple(events), self._engine.stats())

    def _handle(self, message: ToEngine) -> list[Event]:
        if isinstance(message, Add):
            return self._add(message)
        return [Failed(name, message.error) for name in message.request_ids if self._engine.cancel(name)]

    def _add(self, message: Add) -> list[Event]:
        try:
            self._engine.add(message.request)
        except Exception as error:  # noqa: BLE001 - a request the engine cannot take harms no other
            _log.exception("the engine refused request %r", message.request.id)
            return [Failed(message.request.id, error)]
        return []
