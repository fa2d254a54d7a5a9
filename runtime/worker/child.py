"""The engine's process, started by `runtime.worker.process` as `python -m runtime.worker.child NAME`.

It reads messages from its standard input and writes messages to its original standard output. It lives no longer than
its parent: the end of its input ends it, even in the middle of a decode; one that keeps prefixes on disk has
LAST_SECONDS to write them. The parent decides when to stop, so the signals that a terminal or a service manager sends
to both are ignored here.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import BinaryIO, NoReturn

from runtime.errors import EngineError, LoadFailed, RequestError, encodable
from runtime.requests import Event, Failed

from .messages import (
    Add,
    Died,
    EngineLike,
    FromEngine,
    Logged,
    MessageInvalid,
    Order,
    Ready,
    Start,
    Stepped,
    read_to_engine,
    unpack_recipe,
    write_message,
)

EXIT_DIED = 1
# An engine without work for so long gives memory back. What it computed comes back from snapshots in milliseconds.
REST_SECONDS = 10.0
# For the last step and for what is written to disk at the end; less than a parent's grace period.
LAST_SECONDS = 3.0

_log = logging.getLogger("deskside.worker")


class EngineLoop:
    """Runs an engine. One thread calls `turn`, over and over; any thread may put orders into `inbox`."""

    def __init__(self, engine: EngineLike, inbox: "SimpleQueue[Order | None]") -> None:
        """None in `inbox` ends the loop."""
        self._engine = engine
        self._inbox = inbox
        self._rested = False

    def turn(self) -> Stepped | None:
        """Handle the orders that came, then compute a step; waits while the engine has no work. None at the end.

        An engine that waits long gives memory back, and tells its figures after that.

        Raises the engine's fatal error, without the events of that step: the supervisor knows which requests are live.
        """
        orders: list[Order | None] = []
        if not self._engine.has_work:
            try:
                orders.append(self._inbox.get(timeout=None if self._rested else REST_SECONDS))
            except Empty:
                self._engine.rest()
                self._rested = True
                return Stepped((), self._engine.stats())
        self._rested = False
        while not self._inbox.empty():
            orders.append(self._inbox.get())
        events: list[Event] = []
        for order in orders:
            if order is None:
                return None
            events += self._handle(order)
        if not events and self._engine.has_work:
            events = self._engine.step()
            if self._engine.failure is not None:
                raise self._engine.failure
        return Stepped(tuple(events), self._engine.stats())

    def _handle(self, order: Order) -> list[Event]:
        if isinstance(order, Add):
            return self._add(order)
        return [Failed(name, order.error) for name in order.request_ids if self._engine.cancel(name)]

    def _add(self, order: Add) -> list[Event]:
        try:
            self._engine.add(order.request)
        except RequestError as error:  # the client's own fault, which its answer tells
            return [Failed(order.request.id, error)]
        except Exception as error:  # noqa: BLE001 - a request the engine cannot take harms no other
            _log.exception("the engine refused request %r", order.request.id)
            return [Failed(order.request.id, error)]
        return []


class Outbox:
    """The pipe to the parent. Any thread may send."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        """Send a message. Exits if the parent is gone."""
        try:
            with self._lock:
                write_message(self._pipe, message)
        except OSError:
            _exit_now(0)


class _Forward(logging.Handler):
    """Sends log lines to the parent, which has the log's settings."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        self._outbox.send(Logged(record.name, record.levelno, encodable(self.format(record))))


def main() -> NoReturn:
    """Build the engine that the parent names, and run it until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    source, outbox = _take_pipes()
    try:
        start = read_to_engine(source)
    except EOFError:
        _exit_now(0)
    if not isinstance(start, Start):
        raise MessageInvalid(f"the first message is {type(start).__name__}, not Start")
    logging.basicConfig(handlers=[_Forward(outbox)], format="%(message)s")
    for name, level in start.log_levels.items():
        logging.getLogger(name).setLevel(level)
    arrived: SimpleQueue[Order | None] = SimpleQueue()
    keeps = threading.Event()
    threading.Thread(target=_read, args=(source, arrived, keeps), name="deskside-reader", daemon=True).start()
    try:
        _run(start, arrived, outbox, keeps)
        _exit_now(0)
    except Exception as error:  # noqa: BLE001 - the parent must get the reason of every end
        if not isinstance(error, EngineError):
            _log.critical("the engine broke: %s", error, exc_info=error)
            error = EngineError(f"the engine broke: {type(error).__name__}: {error}")
        outbox.send(Died(error))
    _exit_now(EXIT_DIED)


def _take_pipes() -> tuple[BinaryIO, Outbox]:
    """The pipes from and to the parent. Output that C or Python code prints goes to stderr instead."""
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, Outbox(target)


def _read(source: BinaryIO, arrived: "SimpleQueue[Order | None]", keeps: threading.Event) -> NoReturn:
    """Queue the parent's orders. Exits at the end of the input, even while other threads work.

    If the engine `keeps` prefixes, its loop ends first, in LAST_SECONDS at most.
    """
    try:
        while True:
            message = read_to_engine(source)
            if isinstance(message, Start):
                raise MessageInvalid("a second Start")
            arrived.put(message)
    except EOFError:
        if keeps.is_set():
            arrived.put(None)
            time.sleep(LAST_SECONDS)
        _exit_now(0)
    except BaseException:  # noqa: BLE001 - an engine that gets no orders must not live on
        _log.critical("the engine cannot read its messages", exc_info=True)
        _exit_now(EXIT_DIED)


def _run(start: Start, arrived: "SimpleQueue[Order | None]", outbox: Outbox, keeps: threading.Event) -> None:
    try:
        engine, info = unpack_recipe(start).build()
    except (EngineError, MemoryError) as error:
        raise LoadFailed(str(error) or "not enough memory to load the model") from error
    if engine.keeps:
        keeps.set()
    inbox: SimpleQueue[Order | None] = SimpleQueue()
    threading.Thread(target=_prepare, args=(engine, arrived, inbox), name="deskside-prepare", daemon=True).start()
    outbox.send(Ready(info, engine.stats()))
    loop = EngineLoop(engine, inbox)
    while (stepped := loop.turn()) is not None:
        outbox.send(Stepped(tuple(map(_sanitised, stepped.events)), stepped.stats))
    engine.close()


def _prepare(engine: EngineLike, arrived: "SimpleQueue[Order | None]", inbox: "SimpleQueue[Order | None]") -> NoReturn:
    """Forward orders in their sequence, compiling grammars here so that the engine loop never waits for one."""
    while True:
        order = arrived.get()
        if isinstance(order, Add):
            with suppress(Exception):  # the engine's `add` meets it again, and fails the one request
                engine.prepare(order.request)
        inbox.put(order)


def _sanitised(event: Event) -> Event:
    """`event`, with an error that is not one of the runtime's logged here and replaced: it cannot travel."""
    if not isinstance(event, Failed) or isinstance(event.error, RequestError | EngineError):
        return event
    _log.error("request %r failed", event.request_id, exc_info=event.error)
    return Failed(event.request_id, EngineError("internal error in the engine; the server's log has the details"))


def _exit_now(code: int) -> NoReturn:
    """Exit without clean-up: the main thread may be deep in C, and the system frees the memory."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
