"""A toy engine for a process of its own, which dies on order: what it does stands in the text that it works on.

A token of a batch that is one of ORDERS makes the process do that before the decode: once, whatever the number of
processes, but for POISON, which kills each of them. It imports little, since every process of a test imports it.
"""

import fcntl
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import DecodeFailed, LoadFailed
from runtime.llama.interface import Batch, ModelInfo

from .fakes import FakeLlama
from .prefixes import store

EXIT_CODE = 7


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise DecodeFailed("llama_decode gave -3")


def send(data: bytes) -> None:
    """Write to the pipe to the supervisor, which is the one pipe open for writing beside stdout and stderr."""
    for number in range(3, 64):
        with suppress(OSError):
            writes = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
            if writes and stat.S_ISFIFO(os.fstat(number).st_mode):
                os.write(number, data)
                return
    raise AssertionError("no pipe to the supervisor")


def half_a_message() -> None:
    """Begin a message of 100 bytes, and end in its middle."""
    send((100).to_bytes(8, "little") + b"half")
    die()


def garbage() -> None:
    """Send a whole frame that holds no message."""
    send((4).to_bytes(8, "little") + b"junk")


def hang() -> None:
    time.sleep(10_000)


WAIT, POISON = "W", "P"
ORDERS: dict[str, Callable[[], None]] = {
    "K": die,
    "A": os.abort,
    "X": lambda: os._exit(EXIT_CODE),
    "F": fail,
    "H": half_a_message,
    "G": garbage,
    "S": hang,
    "M": lambda: sys.exit("out of memory"),
}


@dataclass(frozen=True)
class FakeRecipe:
    """An `EngineRecipe` over FakeLlama. In `folder` it leaves the ids of its processes and looks for orders.

    It keeps prefixes under `prefixes`.
    """

    folder: Path
    script: str = "hello"
    slots: int = 4
    prefixes: Path | None = None

    def build(self) -> tuple[Engine, ModelInfo]:
        """Obey the order for the start, if there is one: `die`, `hold` or `refuse`."""
        with (self.folder / "pids").open("a") as pids:
            pids.write(f"{os.getpid()}\n")
        if (self.folder / "die").exists():
            die()
        while (self.folder / "hold").exists():
            time.sleep(0.002)
        if (self.folder / "refuse").exists():
            raise LoadFailed("tensor 'x' not found")
        print("printed", flush=True)  # by C or Python, it must not get between the messages
        logging.getLogger("deskside.llama").warning("a warning of llama.cpp")
        llama = FakeLlama(n_ctx=4096, script=self.script, on_decode=self._obey)
        disk = None if self.prefixes is None else store(self.prefixes)
        engine = Engine(llama, EngineOptions(max_running=self.slots), Grammars(llama.tokenizer), disk=disk)
        return engine, replace(llama.info, description="toy")

    def _obey(self, _: int, batch: Batch) -> None:
        for letter in map(chr, batch.tokens):
            if letter == WAIT:
                self._wait()
            elif letter == POISON:
                die()
            elif letter in ORDERS and self._first(letter):
                ORDERS[letter]()

    def _wait(self) -> None:
        """Until the file `go` is there; `waits` says that this place was reached."""
        (self.folder / "waits").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.002)

    def _first(self, letter: str) -> bool:
        try:
            (self.folder / f"done-{letter}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @property
    def pids(self) -> list[int]:
        """Of all processes so far."""
        file = self.folder / "pids"
        return [int(line) for line in file.read_text().split()] if file.exists() else []
