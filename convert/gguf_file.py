"""Writing a GGUF file: streamed to a name of its own, read back and compared by sha256 per tensor, then renamed."""

import hashlib
import os
import struct
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from models.errors import BadGguf, StoreError
from models.gguf_fields import MAGIC, Field
from models.gguf_header import TensorInfo, padded, read_header

from .errors import VerifyFailed

_VERSION = 3
_CHUNK_BYTES = 1 << 20

Rows = Callable[[str], Iterator[np.ndarray]]
"""Tensor name -> its data in order, in pieces."""


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written; `shape` in numpy's order."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Its size in the file, without padding."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // int(block) * int(block_bytes)


@dataclass(frozen=True)
class Layout:
    """A GGUF file without its weights: metadata in order, tensors in order, alignment in bytes."""

    fields: Mapping[str, Field]
    tensors: Sequence[OutTensor]
    alignment: int

    @property
    def data_bytes(self) -> int:
        """The size of all tensors with padding."""
        return sum(padded(tensor.n_bytes, self.alignment) for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return len(self.head()) + self.data_bytes

    def head(self) -> bytes:
        """Everything before the first tensor, padded."""
        head = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(self.tensors), len(self.fields)))
        for key, field in self.fields.items():
            head += _text(key) + field.raw
        offset = 0
        for tensor in self.tensors:
            head += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            head += struct.pack("<IQ", tensor.kind, offset)
            offset += padded(tensor.n_bytes, self.alignment)
        return bytes(head.ljust(padded(len(head), self.alignment), b"\0"))


def write_gguf(target: Path, layout: Layout, rows: Rows, advance: Callable[[int], None]) -> dict[str, str]:
    """Write `target` and return tensor name -> sha256 of its bytes. `advance` is told each piece's bytes.

    The same input gives the same bytes. On an error nothing is left. Raises VerifyFailed when the disk holds
    something else than was written, StoreError when the disk is full, and whatever `rows` raises.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(layout.head())
            with closing(_ahead(_pieces(layout, rows))) as pieces:
                hashes = {
                    tensor.name: _write_tensor(file, tensor, layout, pieces, advance) for tensor in layout.tensors
                }
            file.flush()
            os.fsync(file.fileno())
        _check(partial, hashes)
        partial.replace(target)
    except OSError as error:
        raise StoreError(
            f"{str(target)!r} ({layout.file_bytes} bytes) cannot be written: {error.strerror or error}; make room, "
            "or set DESKSIDE_HOME to a folder on a larger disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return hashes


def hash_tensors(path: Path) -> dict[str, str]:
    """Tensor name -> sha256 of its bytes in the file. Raises BadGguf when the file is malformed."""
    tensors = read_header(path).tensors
    with path.open("rb") as file:
        return {name: _hash_range(file, tensor) for name, tensor in tensors.items()}


def _pieces(layout: Layout, rows: Rows) -> Iterator[np.ndarray | None]:
    """All tensors' pieces in order, None after each tensor's last."""
    for tensor in layout.tensors:
        yield from rows(tensor.name)
        yield None


def _ahead(pieces: Iterator[np.ndarray | None]) -> Generator[np.ndarray | None, None, None]:
    """The same, each made by another thread while the one before it is hashed and written."""
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(_one_of, pieces)
        while piece := upcoming.result():
            upcoming = worker.submit(_one_of, pieces)
            yield piece[0]


def _one_of(pieces: Iterator[np.ndarray | None]) -> list[np.ndarray | None]:
    return list(islice(pieces, 1))


def _write_tensor(
    file: BinaryIO,
    tensor: OutTensor,
    layout: Layout,
    pieces: Iterator[np.ndarray | None],
    advance: Callable[[int], None],
) -> str:
    digest, written = hashlib.sha256(), 0
    while (piece := next(pieces)) is not None:
        data = np.ascontiguousarray(piece).data.cast("B")
        digest.update(data)
        file.write(data)
        written += len(data)
        advance(len(data))
    if written != tensor.n_bytes:
        raise VerifyFailed(
            f"tensor {tensor.name!r} has {written} bytes, its shape {tensor.shape} needs {tensor.n_bytes}"
        )
    file.write(bytes(padded(written, layout.alignment) - written))
    return digest.hexdigest()


def _check(path: Path, hashes: Mapping[str, str]) -> None:
    try:
        found = hash_tensors(path)
    except BadGguf as error:
        raise VerifyFailed(f"what was written cannot be read back: {error}") from error
    for name, expected in hashes.items():
        if found.get(name) != expected:
            raise VerifyFailed(f"tensor {name!r} was written with sha256 {expected}, the disk has {found.get(name)}")


def _hash_range(file: BinaryIO, tensor: TensorInfo) -> str:
    digest, left = hashlib.sha256(), tensor.n_bytes
    file.seek(tensor.offset)
    while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
