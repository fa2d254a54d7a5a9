"""The host that gives the engine a process of its own: whatever kills the engine leaves the server standing.

A fresh interpreter, never a fork: a process that holds llama.cpp's threads cannot be forked safely. One thread here
writes to the engine (nobody else may wait for it), and the supervisor's thread reads.
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

from runtime.errors import EngineDied, LoadFailed
from runtime.llama.interface import ModelInfo
from runtime.requests import EngineStats, TextDelta

from .child import EngineLoop, Inbox
from .messages import (
    Add,
    Broke,
    EngineLike,
    EngineRecipe,
    Logged,
    Ready,
    Start,
    Stepped,
    ToEngine,
    read_nouns,
    write_message,
)


class EngineRun(ABC):
    """One engine, from its start to its end."""

    @abstractmethod
    def await_ready(self) -> EngineStats:
        """Wait until the model is loaded. Raises LoadFailed, or what `receive` raises."""

    @abstractmethod
    def send(self, messages: Sequence[ToEngine]) -> None:
        """Leave messages for the engine, from any thread. Never waits; lost if the engine is gone."""

    @abstractmethod
    def receive(self) -> Stepped | None:
        """Wait for what comes of the next step. None once `stop` was called; raises EngineError if the engine ended."""

    @abstractmethod
    def stop(self) -> None:
        """End the engine, from any thread; `receive` then returns. Harmless if it has ended."""

    @abstractmethod
    def close(self) -> None:
        """Free what is left, once nobody is in `receive` any more. Closing twice is harmless."""


class EngineHost(ABC):
    """Brings engines to life."""

    @property
    @abstractmethod
    def relaunches(self) -> bool:
        """Whether another engine can follow one that ended."""

    @abstractmethod
    def launch(self) -> EngineRun:
        """Begin a life. Raises OSError if the machine has no room for it."""


class ThreadHost(EngineHost):
    """Runs one engine in the thread that calls `receive`. What kills it kills the whole process."""

    relaunches = False

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine

    def launch(self) -> EngineRun:
        """The engine's only life."""
        return _ThreadRun(self._engine)


class _ThreadRun(EngineRun):
    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._inbox = Inbox()
        self._loop = EngineLoop(engine, self._inbox)

    def await_ready(self) -> EngineStats:
        return self._engine.stats()

    def send(self, messages: Sequence[ToEngine]) -> None:
        self._inbox.put(messages)

    def receive(self) -> Stepped | None:
        return self._loop.turn()

    def stop(self) -> None:
        self._inbox.close()

    def close(self) -> None:
        self._engine.close()


# For an engine to leave by itself. It does so at once unless it is frozen, or stuck in the kernel.
STOP_SECONDS = 5.0
# How often somebody looks whether the engine still gives signs.
WATCH_SECONDS = 1.0
_FORWARDED = ("deskside", "deskside.worker", "deskside.llama")

_log = logging.getLogger("deskside.worker")


class ProcessHost(EngineHost):
    """Starts engines as `recipe` says, each in a new process; the first one at once. `name` is shown by `ps`.

    An engine that has work and gives no sign for `silence_s` is killed: a step of it takes nowhere near as long.
    """

    relaunches = True

    def __init__(self, recipe: EngineRecipe, name: str, silence_s: float = 600.0) -> None:
        self._recipe = recipe
        self._name = name
        self._silence_s = silence_s
        self._first: ProcessRun | None = ProcessRun(recipe, name, silence_s)

    def await_loaded(self) -> ModelInfo:
        """What the first engine has loaded. Raises LoadFailed, also when the process died of it."""
        assert self._first is not None, "the first engine is at work already"
        try:
            self._first.await_ready()
        except EngineDied as error:
            raise LoadFailed(f"{self._name!r} cannot be loaded: {error}") from error
        assert self._first.info is not None
        return self._first.info

    def launch(self) -> EngineRun:
        """The first life, which has begun already, or another one."""
        first, self._first = self._first, None
        return first or ProcessRun(self._recipe, self._name, self._silence_s)

    def close(self) -> None:
        """End the first life, if nobody has taken it."""
        if self._first is not None:
            self._first.stop()
            self._first.close()


class ProcessRun(EngineRun):
    """One engine process."""

    def __init__(self, recipe: EngineRecipe, name: str, silence_s: float) -> None:
        command = [sys.executable, "-P", "-m", "runtime.worker.child", name]
        with _signals_held():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
        self._source = cast(BinaryIO, self._process.stdout)
        self._writer = _Writer(cast(BinaryIO, self._process.stdin))
        self._writer.put([Start(recipe, {name: logging.getLogger(name).getEffectiveLevel() for name in _FORWARDED})])
        self._stopping = False
        self._ready: Ready | None = None
        self._silence_s = silence_s
        self._silent = False
        self._open: set[str] = set()
        self._last_sign_s = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="deskside-watch", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def info(self) -> ModelInfo | None:
        """What is loaded, once it is."""
        return self._ready.info if self._ready else None

    def await_ready(self) -> EngineStats:
        """Wait until the model is loaded. Raises LoadFailed or EngineDied."""
        if self._ready is None:
            message = self._read()
            if not isinstance(message, Ready):
                raise EngineDied("the engine's process was told to stop while it loaded the model")
            self._ready = message
        return self._ready.stats

    def send(self, messages: Sequence[ToEngine]) -> None:
        """Leave messages for the writing thread."""
        if not self._open:
            self._last_sign_s = time.monotonic()
        self._open |= {message.request.id for message in messages if isinstance(message, Add)}
        self._writer.put(messages)

    def receive(self) -> Stepped | None:
        """What came of the next step."""
        message = self._read()
        if isinstance(message, Ready):
            raise EngineDied("the engine's process began anew in the middle of its work")
        if message is not None:
            self._last_sign_s = time.monotonic()
            self._open -= {event.request_id for event in message.events if not isinstance(event, TextDelta)}
        return message

    def stop(self) -> None:
        """End the process: it leaves at the end of its input, and is killed if it does not."""
        self._stopping = True
        self._writer.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Close the pipes."""
        self._over.set()
        self._writer.join()
        self._source.close()

    def _read(self) -> Ready | Stepped | None:
        while True:
            try:
                message = read_nouns(self._source)
            except EOFError:
                self._require_stopping()
                return None
            except pickle.UnpicklingError as error:
                self._process.kill()
                raise EngineDied(f"the engine's process sent what nobody understands: {error}") from error
            if isinstance(message, Logged):
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
            elif isinstance(message, Broke):
                raise message.error
            else:
                assert isinstance(message, Ready | Stepped)
                return message

    def _require_stopping(self) -> None:
        """The process is over, or good for nothing. Raises EngineDied unless it was told to stop."""
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._stopping:
            return
        cause = f"silent for {self._silence_s:g} s with work to do" if self._silent else cause_of_death(code)
        raise EngineDied(f"the engine's process {self.pid} ended: {cause}")

    def _watch(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            if self._open and time.monotonic() - self._last_sign_s > self._silence_s:
                self._silent = True
                self._process.kill()
                return


class _Writer:
    """Writes messages in a thread of its own, so that an engine that does not read holds nobody up."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._messages: deque[object] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="deskside-to-engine", daemon=True)
        self._thread.start()

    def put(self, messages: Sequence[object]) -> None:
        with self._changed:
            self._messages.extend(messages)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._messages and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        break
                    message = self._messages.popleft()
                write_message(self._pipe, message)
        except OSError:
            pass  # the engine is gone: its reader finds out, and says why
        except Exception:  # noqa: BLE001 - with the pipe the engine ends too: nobody waits for what was not sent
            _log.exception("a message cannot be sent to the engine")
        with contextlib.suppress(OSError):
            self._pipe.close()


def cause_of_death(code: int) -> str:
    """An exit code in words. Negative ones are signals."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"killed by signal {-code}"
    hints = {"SIGKILL": " (kill -9, or the system ran out of memory)", "SIGABRT": " (llama.cpp gave up; see the log)"}
    return f"killed by {name}{hints.get(name, '')}"


def _environment() -> dict[str, str]:
    """This process's, with the same places to import from, and no debugger attached to an engine that aborts."""
    return {"GGML_NO_BACKTRACE": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Until the new process can ignore them itself, a terminal's signals must not reach it: it inherits this mask."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
