"""What the supervisor and the engine say to each other: the same nouns whether a pipe lies between them or not."""

import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, BinaryIO, Protocol

from runtime.errors import EngineError
from runtime.llama.interface import ModelInfo
from runtime.requests import EngineStats, Event, Work


class EngineLike(Protocol):
    """What its owner needs of an engine. Nothing else is called, and all but `prepare` from one thread only."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def failure(self) -> Exception | None:
        """The fatal error that ended the engine, if one did."""

    def prepare(self, request: Work) -> None:
        """Do for a request what would hold up the others in `add`. Any thread."""

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


class EngineRecipe(Protocol):
    """All that an engine is made of. Frozen and picklable: it travels to the process that builds the engine."""

    def build(self) -> tuple[EngineLike, ModelInfo]:
        """Load the model. Raises LoadFailed."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first word to an engine's process: what to load, and the level of each logger whose lines are wanted."""

    recipe: EngineRecipe
    log_levels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Add:
    """To the engine: answer this."""

    request: Work


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the engine: end these requests with `error`, those that are still live."""

    request_ids: tuple[str, ...]
    error: Exception


@dataclass(frozen=True, slots=True)
class Ready:
    """From the engine: the model is loaded, requests may come."""

    info: ModelInfo
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Stepped:
    """From the engine: what came of one step, and what the engine holds after it."""

    events: tuple[Event, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Broke:
    """From the engine, its last word: it could not be built (LoadFailed), or cannot go on."""

    error: EngineError


@dataclass(frozen=True, slots=True)
class Logged:
    """From the engine: a line for the log."""

    logger: str
    level: int
    text: str


ToEngine = Add | Cancel
FromEngine = Ready | Stepped | Broke | Logged

_COUNTERS = tuple(
    field.name for field in fields(EngineStats) if field.name.endswith("_total") and field.name != "kv_cells_total"
)


def summed(before: EngineStats, now: EngineStats) -> EngineStats:
    """What an engine holds `now`, with the totals of the engines that ran before it."""
    return replace(now, **{name: getattr(before, name) + getattr(now, name) for name in _COUNTERS})


_LENGTH = struct.Struct("<Q")
_NOUNS = {"runtime.errors", "runtime.requests", "runtime.llama.interface", "runtime.worker.messages"}
# How numpy's numbers and arrays are written.
_NUMPY = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
}


def write_message(pipe: BinaryIO, message: object) -> None:
    """Send a message. Raises OSError if nobody reads any more."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_trusted(pipe: BinaryIO) -> Any:
    """The next message of a sender that may make anything happen here. Raises EOFError at the end, or within one."""
    return pickle.loads(_read_frame(pipe))  # noqa: S301 - from the parent process only


def read_nouns(pipe: BinaryIO) -> Any:
    """The next message, made of our nouns only. Raises EOFError at the end, or within one; UnpicklingError."""
    return _NounReader(io.BytesIO(_read_frame(pipe))).load()


def _read_frame(pipe: BinaryIO) -> bytes:
    (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    return _read_exactly(pipe, length)


def _read_exactly(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError(f"the pipe ended {count - len(data)} bytes early")
    return data


class _NounReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module in _NOUNS and "." not in name) or (module, name) in _NUMPY:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no noun of the protocol")
