"""Messages over a pipe between two processes of ours: a length, then a pickle.

Pickles run code when they are read. The engine's process reads those of its parent, which has started it. The other
way round the engine has read a model file from who knows where: of what it sends, only our nouns are made.
"""

import io
import pickle
import struct
from typing import Any, BinaryIO

_LENGTH = struct.Struct("<Q")
_NOUNS = {"runtime.errors", "runtime.sequence", "runtime.llama_protocol", "runtime.worker_protocol"}
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
