"""The messages between a supervisor and an engine's process, and their form on the pipe.

To the engine: one `Start`, then `Add` and `Cancel`; the end of its input tells it to stop. From the engine: `Logged` at
any time, one `Ready`, a `Stepped` after each step, and `Died` last. A frame is the message's length in bytes
(little-endian uint64) and the message itself in msgpack, tagged with its type. Reading checks types and sizes and makes
values of the types named here only: no bytes from an engine can make the server run code.

Vectors travel as their shape and bytes, errors as a code of `ERROR_CODES` with message and fields.
"""

import importlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np

from runtime.errors import ERROR_CODES, EngineError, RequestError, encodable
from runtime.llama.interface import ModelInfo
from runtime.requests import EngineStats, Event, PipeStruct, Work

# Above any valid message (2,048 vectors of 16,384 numbers are 128 MiB), below what a garbled length would allocate.
MAX_FRAME_BYTES = 1 << 30


class EngineLike(Protocol):
    """The engine as its process drives it.

    Any thread may call `prepare`, also during a step. One thread, that of the engine loop, calls everything else.
    """

    @property
    def has_work(self) -> bool:
        """True if `step` has something to do."""

    @property
    def failure(self) -> Exception | None:
        """The fatal error that ended the engine, if one did."""

    @property
    def keeps(self) -> bool:
        """True if something is kept on disk at the end, by `close`."""

    def prepare(self, request: Work) -> None:
        """Do the slow part of `add` (compiling a grammar) ahead of it. Any thread."""

    def add(self, request: Work) -> None:
        """Accept a request."""

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request; its terminal event if it was live."""

    def step(self) -> list[Event]:
        """Compute one step."""

    def rest(self) -> None:
        """Give back memory that an engine without work needs no more."""

    def stats(self) -> EngineStats:
        """Counts and totals after the last step."""

    def close(self) -> None:
        """Write to disk what is kept there, and free the model."""


class EngineRecipe(Protocol):
    """Everything an engine is built from: a frozen dataclass of numbers, strings and paths.

    It travels to the engine's process as its class's name and its fields.
    """

    def build(self) -> tuple[EngineLike, ModelInfo]:
        """Load the model. Raises LoadFailed."""


class Start(PipeStruct, frozen=True, tag=True):
    """To the engine, first: the recipe to build (see `pack_recipe`), and the level of each logger to forward."""

    recipe_class: str
    recipe: bytes
    log_levels: Mapping[str, int]


class Add(PipeStruct, frozen=True, tag=True):
    """To the engine: answer this request."""

    request: Work


class Cancel(PipeStruct, frozen=True, tag=True):
    """To the engine: end those of these requests that are live, with `error`."""

    request_ids: tuple[str, ...]
    error: Exception


class Ready(PipeStruct, frozen=True, tag=True):
    """From the engine: the model is loaded, requests may come."""

    info: ModelInfo
    stats: EngineStats


class Stepped(PipeStruct, frozen=True, tag=True):
    """From the engine: the events of one step, and the engine's counts after it."""

    events: tuple[Event, ...]
    stats: EngineStats


class Died(PipeStruct, frozen=True, tag=True):
    """From the engine, last: it could not be built (LoadFailed), or met a fatal error."""

    error: Exception


class Logged(PipeStruct, frozen=True, tag=True):
    """From the engine: a line for the log."""

    logger: str
    level: int
    text: str


Order = Add | Cancel
ToEngine = Start | Order
FromEngine = Ready | Stepped | Died | Logged


class MessageInvalid(Exception):
    """A frame on the pipe is too large, or holds no message."""


def write_message(pipe: BinaryIO, message: ToEngine | FromEngine) -> None:
    """Send a message.

    Raises OSError if the reader is gone; MessageInvalid if the message is larger than a frame may be; TypeError,
    ValueError or OverflowError if it holds something that does not travel.
    """
    frame = bytearray(_LENGTH.size)
    _ENCODER.encode_into(message, frame, _LENGTH.size)
    n_bytes = len(frame) - _LENGTH.size
    if n_bytes > MAX_FRAME_BYTES:
        raise MessageInvalid(f"a message of {n_bytes} bytes, limit {MAX_FRAME_BYTES}")
    _LENGTH.pack_into(frame, 0, n_bytes)
    pipe.write(frame)
    pipe.flush()


def read_to_engine(pipe: BinaryIO) -> ToEngine:
    """The supervisor's next message. Raises EOFError at the end, also within a frame; MessageInvalid."""
    message: ToEngine = _decode(_TO_ENGINE, _read_frame(pipe))
    return message


def read_from_engine(pipe: BinaryIO) -> FromEngine:
    """The engine's next message. Raises EOFError at the end, also within a frame; MessageInvalid."""
    message: FromEngine = _decode(_FROM_ENGINE, _read_frame(pipe))
    return message


def pack_recipe(recipe: EngineRecipe, log_levels: Mapping[str, int]) -> Start:
    """The message that has an engine's process build `recipe`."""
    kind = type(recipe)
    return Start(f"{kind.__module__}:{kind.__qualname__}", _ENCODER.encode(recipe), log_levels)


def unpack_recipe(start: Start) -> EngineRecipe:
    """The recipe of `start`. Imports its class, so read `start` from the parent process only."""
    module, _, name = start.recipe_class.partition(":")
    kind = getattr(importlib.import_module(module), name)
    recipe: EngineRecipe = _decode(msgspec.msgpack.Decoder(kind, dec_hook=_from_plain), start.recipe)
    return recipe


class _ErrorFields(PipeStruct, frozen=True):
    """An error as it travels: `kind` of ERROR_CODES, and the attributes that it has of these."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None


class _Vectors(PipeStruct, frozen=True):
    """A float32 array as it travels, in this machine's byte order."""

    shape: tuple[int, ...]
    data: bytes


def _to_plain(value: Any) -> Any:
    """`value`, of a type that msgpack lacks, as one that it has."""
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value.shape, np.ascontiguousarray(value).data  # as `_Vectors`, but copied once only
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Exception):
        return _error_fields(value)
    if isinstance(value, PurePath):
        return os.fsencode(value)
    raise TypeError(f"a {type(value).__name__} does not travel between processes")


def _from_plain(kind: type, value: Any) -> Any:
    """The inverse of `_to_plain` for a field of type `kind`. Raises ValueError, TypeError or msgspec's own error."""
    if kind is np.ndarray:
        vectors = msgspec.convert(value, _Vectors)
        return np.frombuffer(vectors.data, np.float32).reshape(vectors.shape)
    if kind is Exception:
        return _error_of(msgspec.convert(value, _ErrorFields))
    if kind is Path:
        return Path(os.fsdecode(value))
    raise TypeError(f"no {kind.__name__} travels between processes")


def _error_fields(error: Exception) -> _ErrorFields:
    kind = next((ERROR_CODES[kind] for kind in type(error).__mro__ if kind in ERROR_CODES), None)
    if kind is None:
        raise TypeError(f"a {type(error).__name__} is no error of the runtime and does not travel")
    attributes = (getattr(error, name, None) for name in ("param", "code", "retry_after_s"))
    return _ErrorFields(kind, encodable(str(error)), *attributes)


def _error_of(fields: _ErrorFields) -> Exception:
    kind = _ERROR_KINDS.get(fields.kind)
    if kind is None:
        raise ValueError(f"there is no error {fields.kind!r}")
    error = kind(fields.message)
    for name in ("param", "code", "retry_after_s"):
        if (value := getattr(fields, name)) is not None:
            setattr(error, name, value)
    return error


def _decode(decoder: Any, data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MessageInvalid(f"{len(data)} bytes are no message: {error}") from error


def _read_frame(pipe: BinaryIO) -> bytes:
    (n_bytes,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    if n_bytes > MAX_FRAME_BYTES:
        raise MessageInvalid(f"a message of {n_bytes} bytes is announced, limit {MAX_FRAME_BYTES}")
    return _read_exactly(pipe, n_bytes)


def _read_exactly(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError(f"the pipe ended {count - len(data)} bytes early")
    return data


_LENGTH = struct.Struct("<Q")
_ERROR_KINDS: dict[str, type[RequestError | EngineError]] = {code: kind for kind, code in ERROR_CODES.items()}
_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine, dec_hook=_from_plain)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine, dec_hook=_from_plain)
