"""Open a checkpoint: its header in GGUF's terms, and its weights as float32, a slab of rows at a time.

A slab, not a tensor, is held in memory: the embedding of a 270M model alone takes 670 MB in float32.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf.quants import dequantize

from convert.errors import SourceInvalid
from convert.tokenizer.read import read_vocabulary
from models.gguf.header import Header, TensorInfo, read_header

from .folder import HfCheckpoint

SLAB_ELEMENTS = 1 << 22
_PARTS_OF_A_FOLDER = (".safetensors", ".json", ".bin", ".pt", ".pth")


class Checkpoint(Protocol):
    """A checkpoint to convert, open for reading. Close it when done."""

    @property
    def header(self) -> Header:
        """Fields and tensors under their GGUF names. The tensors' `offset` is for the checkpoint itself only."""

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) until the tensor is read; 3-d tensors are flattened.

        Rows have the GGUF's order and form (permuted, norms + 1 …). Raises SourceInvalid naming the tensor when a
        value is not finite or the data cannot be read.
        """

    def close(self) -> None:
        """Close its files."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face folder with its tokenizer.

    Raises BadGguf, SourceInvalid, ArchitectureUnknown or TokenizerInvalid naming the file and the fault.
    """
    if path.is_dir():
        return HfCheckpoint(path, read_vocabulary)
    if path.suffix in _PARTS_OF_A_FOLDER:
        raise SourceInvalid(f"{str(path)!r} is one file of a checkpoint: give the folder with its config.json")
    return GgufCheckpoint(path)


class GgufCheckpoint:
    """A GGUF file, open for reading. Close it when done."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header. Raises BadGguf, or SourceInvalid for one part of a split GGUF."""
        self.header = read_header(path)
        parts = self.header.fields.get("split.count")
        if parts is not None and parts.value not in {0, 1}:
            raise SourceInvalid(f"{str(path)!r} is one of {parts.value} parts; join them with llama-gguf-split --merge")
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """Close the file."""
        self._data.close()

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) until the tensor is read; 3-d tensors are flattened.

        Raises SourceInvalid when the tensor's type cannot be dequantized.
        """
        width = tensor.shape[-1]
        n_rows = tensor.n_elements // width
        row_bytes = tensor.n_bytes // n_rows
        step = max(1, SLAB_ELEMENTS // width)
        for start in range(0, n_rows, step):
            rows = min(step, n_rows - start)
            # a copy, so that no array outlives the map
            raw = self._data[tensor.offset + start * row_bytes : tensor.offset + (start + rows) * row_bytes]
            yield start, self._widen(tensor, np.frombuffer(raw, dtype=np.uint8)).reshape(rows, width)

    def stored(self, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yield the tensor's bytes as the file has them, in pieces."""
        for start in range(tensor.offset, tensor.offset + tensor.n_bytes, SLAB_ELEMENTS):
            raw = self._data[start : min(start + SLAB_ELEMENTS, tensor.offset + tensor.n_bytes)]
            yield np.frombuffer(raw, dtype=np.uint8)

    def _widen(self, tensor: TensorInfo, raw: np.ndarray) -> np.ndarray:
        try:
            # as one row: the library works in groups of 16 rows, which would cost time here
            widened = dequantize(raw.reshape(1, -1), tensor.kind)
        except NotImplementedError:
            raise SourceInvalid(
                f"{str(self.header.path)!r}: tensor {tensor.name!r} is {tensor.kind.name}, which cannot be dequantized"
            ) from None
        return np.asarray(widened, dtype=np.float32)
