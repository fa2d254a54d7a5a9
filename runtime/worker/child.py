"""The engine's process, started by `worker_process` as `python -m runtime.worker.child NAME`.

It reads messages from its standard input and writes what comes of them to what was its standard output. It lives no
longer than its parent: the end of its input ends it, whatever it is at. When to stop is the parent's decision, so the
signals that a terminal or a service manager sends to both are ignored here.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue
from typing import BinaryIO, NoReturn

from runtime.errors import EngineError, LoadFailed, RequestError
from runtime.requests import Event, Failed

from .messages import (
    Add,
    Broke,
    EngineLike,
    FromEngine,
    Logged,
    Ready,
    Start,
    Stepped,
    ToEngine,
    read_trusted,
    write_message,
)


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


BROKE = 1

_log = logging.getLogger("deskside.worker")


class Outbox:
    """The way to the parent. Lines for the log may come from any thread."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        """Send a message; without a reader there is nothing left to do."""
        try:
            with self._lock:
                write_message(self._pipe, message)
        except OSError:
            _exit_now(0)


class _Forward(logging.Handler):
    """Hands log lines to the parent, whose settings say what becomes of them."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.send(Logged(record.name, record.levelno, self.format(record)))


def main() -> NoReturn:
    """Load what the parent says, and run it until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    source, outbox = _take_pipes()
    try:
        start: Start = read_trusted(source)
    except EOFError:
        _exit_now(0)
    logging.basicConfig(handlers=[_Forward(outbox)], format="%(message)s")
    for name, level in start.log_levels.items():
        logging.getLogger(name).setLevel(level)
    arrived: SimpleQueue[ToEngine] = SimpleQueue()
    threading.Thread(target=_read, args=(source, arrived), name="deskside-reader", daemon=True).start()
    try:
        _run(start, arrived, outbox)
    except Exception as error:  # noqa: BLE001 - the parent must hear of it, whatever it is
        if not isinstance(error, EngineError):
            _log.critical("the engine broke: %s", error, exc_info=error)
            error = EngineError(f"the engine broke: {type(error).__name__}: {error}")
        outbox.send(Broke(error))
    _exit_now(BROKE)


def _take_pipes() -> tuple[BinaryIO, Outbox]:
    """The two ends that the parent gave. What C or Python code prints goes to stderr instead."""
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, Outbox(target)


def _read(source: BinaryIO, arrived: "SimpleQueue[ToEngine]") -> NoReturn:
    try:
        while True:
            arrived.put(read_trusted(source))
    except EOFError:
        _exit_now(0)
    except BaseException:  # noqa: BLE001 - an engine that cannot hear must not live on
        _log.critical("the engine cannot read its messages", exc_info=True)
        _exit_now(BROKE)


def _prepare(engine: EngineLike, arrived: "SimpleQueue[ToEngine]", inbox: Inbox) -> NoReturn:
    """Hand messages on in their order, what takes time done before: in the loop a large grammar would delay a step."""
    while True:
        message = arrived.get()
        if isinstance(message, Add):
            with suppress(Exception):  # the engine's `add` meets it again, and says so to the one request
                engine.prepare(message.request)
        inbox.put([message])


def _run(start: Start, arrived: "SimpleQueue[ToEngine]", outbox: Outbox) -> None:
    try:
        engine, info = start.recipe.build()
    except (EngineError, MemoryError) as error:
        raise LoadFailed(str(error) or "not enough memory to load the model") from error
    inbox = Inbox()
    threading.Thread(target=_prepare, args=(engine, arrived, inbox), name="deskside-inbox", daemon=True).start()
    outbox.send(Ready(info, engine.stats()))
    loop = EngineLoop(engine, inbox)
    while (stepped := loop.turn()) is not None:
        outbox.send(Stepped(tuple(map(_sanitised, stepped.events)), stepped.stats))


def _sanitised(event: Event) -> Event:
    """The event, with a fault that is not one of our errors told in the log instead: it may not travel."""
    if not isinstance(event, Failed) or isinstance(event.error, RequestError | EngineError):
        return event
    _log.error("request %r failed", event.request_id, exc_info=event.error)
    return Failed(event.request_id, EngineError("internal error in the engine; the server's log has the details"))


def _exit_now(code: int) -> NoReturn:
    """At once: the main thread may be deep in C, and the system takes the memory back."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
