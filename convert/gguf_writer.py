"""Write a GGUF file: stream it to a temporary name, hash it on the way, then rename it."""

import hashlib
import struct
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from models.common.files import sha256_file
from models.errors import StoreError
from models.gguf.fields import MAGIC, Field
from models.gguf.header import padded

from .errors import VerifyFailed

_VERSION = 3

Rows = Callable[[str], Iterator[np.ndarray]]
"""Tensor name -> its data in order, in pieces."""


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write; `shape` is in numpy's order."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in the file, without padding."""
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
        return sum(map(len, self.head())) + self.data_bytes

    def head(self) -> Iterator[bytes]:
        """Everything before the first tensor, padded, in pieces, so that a large vocabulary is not copied."""
        n_bytes = 0
        for piece in self._head():
            n_bytes += len(piece)
            yield piece
        yield bytes(padded(n_bytes, self.alignment) - n_bytes)

    def _head(self) -> Iterator[bytes]:
        yield MAGIC + struct.pack("<IQQ", _VERSION, len(self.tensors), len(self.fields))
        for key, field in self.fields.items():
            yield _text(key)
            yield field.raw
        offset = 0
        for tensor in self.tensors:
            yield _text(tensor.name) + struct.pack("<I", len(tensor.shape))
            yield struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            yield struct.pack("<IQ", tensor.kind, offset)
            offset += padded(tensor.n_bytes, self.alignment)


def write_gguf(target: Path, layout: Layout, rows: Rows, advance: Callable[[int], None]) -> str:
    """Write `target` and return the sha256 of its content, by which `check_written` verifies it.

    The same input gives the same bytes. An error leaves no file. `advance` receives the bytes of each piece. Raises
    VerifyFailed if a tensor's data do not fit its shape, StoreError when the disk is full, and errors of `rows`.
    """
    partial = target.with_name(target.name + ".partial")
    digest = hashlib.sha256()
    try:
        with partial.open("wb") as file:

            def put(data: bytes | memoryview) -> None:
                digest.update(data)
                file.write(data)

            for piece in layout.head():
                put(piece)
            with closing(_ahead(_pieces(layout, rows))) as pieces:
                for tensor in layout.tensors:
                    _write_tensor(put, tensor, layout, pieces, advance)
        partial.replace(target)
    except OSError as error:
        raise StoreError(
            f"{str(target)!r} ({layout.file_bytes} bytes) cannot be written: {error.strerror or error}; make room, "
            "or set DESKSIDE_HOME to a folder on a larger disk"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def write_head(target: Path, fields: Mapping[str, Field], alignment: int) -> None:
    """Write a file of metadata alone, from which llama.cpp can read a vocabulary."""
    with target.open("wb") as file:
        file.writelines(Layout(fields, (), alignment).head())


def check_written(path: Path, sha256: str) -> None:
    """Read `path` back. Raises VerifyFailed unless its sha256 is the one it was written with."""
    if (found := sha256_file(path)) != sha256:
        raise VerifyFailed(f"{path.name!r} was written with sha256 {sha256}, the disk has {found}")


def _pieces(layout: Layout, rows: Rows) -> Iterator[np.ndarray | None]:
    """Yield the pieces of all tensors in order, and None after each tensor's last."""
    for tensor in layout.tensors:
        yield from rows(tensor.name)
        yield None


def _ahead(pieces: Iterator[np.ndarray | None]) -> Generator[np.ndarray | None, None, None]:
    """Yield the same pieces; a thread makes each one while the previous one is hashed and written."""
    with ThreadPoolExecutor(1) as worker:
        upcoming = worker.submit(_next_of, pieces)
        while piece := upcoming.result():
            upcoming = worker.submit(_next_of, pieces)
            yield piece[0]


def _next_of(pieces: Iterator[np.ndarray | None]) -> list[np.ndarray | None]:
    return list(islice(pieces, 1))


def _write_tensor(
    put: Callable[[bytes | memoryview], None],
    tensor: OutTensor,
    layout: Layout,
    pieces: Iterator[np.ndarray | None],
    advance: Callable[[int], None],
) -> None:
    written = 0
    while (piece := next(pieces)) is not None:
        data = np.ascontiguousarray(piece).data.cast("B")
        put(data)
        written += len(data)
        advance(len(data))
    if written != tensor.n_bytes:
        raise VerifyFailed(
            f"tensor {tensor.name!r} has {written} bytes, its shape {tensor.shape} needs {tensor.n_bytes}"
        )
    put(bytes(padded(written, layout.alignment) - written))


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
