"""What a soak sees of the server from outside: its processes and their memory (from /proc), and its own gauges."""

import os
import signal
from pathlib import Path

from .process_memory import PROC, children, resident_bytes
from .record import Noun

ENGINE_BYTES = 64 << 20


class Memory(Noun):
    """Resident bytes at a moment: of the server's process, and of its largest child (0 without one)."""

    at_s: float
    server_bytes: int
    engine_pid: int | None
    engine_bytes: int


def engine_of(pid: int, proc: Path = PROC) -> int | None:
    """The engine's process: the server's largest child that holds more than a bare interpreter, or None."""
    sizes = {child: resident_bytes(child, proc) for child in children(pid, proc)}
    engine = max(sizes, key=lambda child: sizes[child], default=None)
    return engine if engine is not None and sizes[engine] >= ENGINE_BYTES else None


def look(pid: int, at_s: float, proc: Path = PROC) -> Memory:
    """The memory of server and engine now."""
    engine = engine_of(pid, proc)
    used = resident_bytes(engine, proc) if engine is not None else 0
    return Memory(at_s=at_s, server_bytes=resident_bytes(pid, proc), engine_pid=engine, engine_bytes=used)


def kill_engine(pid: int) -> int | None:
    """kill -9 the engine of server `pid`: the pid that was killed, or None when it has no engine process."""
    engine = engine_of(pid)
    if engine is not None:
        os.kill(engine, signal.SIGKILL)
    return engine
