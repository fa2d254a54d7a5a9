"""An engine in a process of its own: the server survives every crash of the engine.

A fresh interpreter, never a fork: a process that holds llama.cpp's threads cannot be forked safely. One thread here
writes to the engine, so that no other thread waits for a full pipe, and the supervisor's thread reads.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import BinaryIO, cast

from runtime.errors import EngineDied
from runtime.requests import TextDelta

from .messages import (
    Add,
    Died,
    EngineRecipe,
    Logged,
    MessageInvalid,
    Order,
    Ready,
    Stepped,
    ToEngine,
    pack_recipe,
    read_from_engine,
    write_message,
)

# Grace period before SIGKILL. An engine exits at once when its input ends, unless it is stopped or stuck in the kernel.
STOP_SECONDS = 5.0
# Interval at which the watch thread looks for a hung engine.
WATCH_SECONDS = 1.0
_FORWARDED = ("deskside", "deskside.worker", "deskside.llama")

_log = logging.getLogger("deskside.worker")


class EngineProcess:
    """Launches the engine of `recipe`, each time in a new process, which `ps` shows as `name`.

    An engine that has work and sends nothing for `silence_s` is hung and gets SIGKILL: no step takes nearly as long.
    `clock`, monotonic and in seconds, times that silence.
    """

    def __init__(
        self,
        recipe: EngineRecipe,
        name: str,
        *,
        silence_s: float = 600.0,
        stop_s: float = STOP_SECONDS,
        watch_s: float = WATCH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stop_s` is the grace period before SIGKILL, `watch_s` the interval at which silence is checked."""
        self.recipe = recipe
        self.name = name
        self.silence_s = silence_s
        self.stop_s = stop_s
        self.watch_s = watch_s
        self.clock = clock

    def launch(self) -> "EngineRun":
        """Start a process, which loads the model meanwhile. Raises OSError if the system refuses to start it."""
        return EngineRun(self)


class EngineRun:
    """One engine process, from its launch to its end."""

    def __init__(self, process: EngineProcess) -> None:
        self._options = process
        command = [sys.executable, "-P", "-m", "runtime.worker.child", process.name]
        with _signals_held():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment())
        self._source = cast(BinaryIO, self._process.stdout)
        self._writer = _Writer(cast(BinaryIO, self._process.stdin))
        levels = {name: logging.getLogger(name).getEffectiveLevel() for name in _FORWARDED}
        self._writer.put(pack_recipe(process.recipe, levels))
        self._stopping = False
        self._ready: Ready | None = None
        self._silent = False
        self._open: set[str] = set()
        self._last_sign_s = process.clock()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="deskside-watch", daemon=True).start()

    def await_ready(self) -> Ready:
        """Wait until the model is loaded. Raises LoadFailed or EngineDied."""
        if self._ready is None:
            message = self._read()
            if not isinstance(message, Ready):
                raise EngineDied("the engine's process was stopped while it loaded the model")
            self._ready = message
        return self._ready

    def send(self, messages: Sequence[Order]) -> None:
        """Queue messages for the writer thread, from any thread. Never waits; lost if the engine is gone."""
        if not self._open:
            self._last_sign_s = self._options.clock()
        self._open |= {message.request.id for message in messages if isinstance(message, Add)}
        for message in messages:
            self._writer.put(message)

    def receive(self) -> Stepped | None:
        """Wait for the events of the next step. None after `stop`; raises EngineError if the engine ended."""
        message = self._read()
        if isinstance(message, Ready):
            raise EngineDied("the engine's process reported a second time that the model is loaded")
        if message is not None:
            self._last_sign_s = self._options.clock()
            self._open -= {event.request_id for event in message.events if not isinstance(event, TextDelta)}
        return message

    def stop(self) -> None:
        """End the process, from any thread: its input ends, and SIGKILL follows after the grace period.

        `receive` then returns None. Stopping twice is harmless, and so is stopping an engine that ended.
        """
        self._stopping = True
        self._writer.close()
        self._end()

    def close(self) -> None:
        """Close the pipes, once no thread is in `receive`. Closing twice is harmless."""
        self._over.set()
        self._writer.join()
        self._source.close()

    def _read(self) -> Ready | Stepped | None:
        while True:
            try:
                message = read_from_engine(self._source)
            except EOFError:
                self._require_stopping()
                return None
            except MessageInvalid as error:
                self._process.kill()
                raise EngineDied(f"the engine's process sent no valid message: {error}") from error
            if isinstance(message, Logged):
                logging.getLogger(message.logger).log(message.level, "%s", message.text)
            elif isinstance(message, Died):
                raise message.error
            else:
                return message

    def _require_stopping(self) -> None:
        """Reap the process, which closed its output. Raises EngineDied unless `stop` was called."""
        code = self._end()
        if self._stopping:
            return
        silence = f"silent for {self._options.silence_s:g} s with work to do"
        raise EngineDied(
            f"the engine's process {self._process.pid} ended: {silence if self._silent else cause_of_death(code)}"
        )

    def _end(self) -> int:
        """Wait for the process, which gets SIGKILL after the grace period. Returns its exit code."""
        try:
            return self._process.wait(self._options.stop_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _watch(self) -> None:
        while not self._over.wait(self._options.watch_s):
            if self._open and self._options.clock() - self._last_sign_s > self._options.silence_s:
                self._silent = True
                self._process.kill()
                return


class _Writer:
    """Writes messages in a thread of its own, so that an engine that does not read delays no caller.

    Its queue has no bound of its own: it holds what the supervisor accepted, at most `capacity` requests.
    """

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._messages: SimpleQueue[ToEngine | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="deskside-to-engine", daemon=True)
        self._thread.start()

    def put(self, message: ToEngine) -> None:
        self._messages.put(message)

    def close(self) -> None:
        """End the engine's input; messages still queued are dropped."""
        self._closed = True
        self._messages.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None and not self._closed:
                write_message(self._pipe, message)
        except OSError:
            pass  # the engine is gone: its reader finds out, and says why
        except Exception:  # noqa: BLE001 - the engine ends with its pipe: no request waits for an unsent message
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
    """The environment of this process, with its import path, and no debugger attached to an engine that aborts."""
    return {"GGML_NO_BACKTRACE": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Block SIGINT and SIGTERM while a process starts: it inherits the mask until it can ignore them itself."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
