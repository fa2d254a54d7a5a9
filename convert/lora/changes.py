"""The changes that an adapter makes to a tensor, each applied to a slab of rows at a time, in float32.

Formulas as in https://github.com/huggingface/peft (tuners/lora/layer.py, tuners/lora/variants.py); results equal PEFT's
up to the order in which a matrix product adds. `merge.file_rows` reports values that overflow, by tensor name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from convert.checkpoint.safetensors import SafetensorsFile, StoredTensor
from convert.checkpoint.source import SLAB_ELEMENTS


class Change(Protocol):
    """One step from a tensor of the base to the tuned one, with rows in the GGUF's order."""

    def apply(self, start: int, rows: np.ndarray) -> np.ndarray:
        """The changed rows `start …`, float32 of the same shape (rows, n_in). Does not modify `rows`."""


@dataclass(frozen=True, eq=False)
class Lora:
    """W + scale · B · A of one module: a of shape (rank, n_in), b of shape (n_out, rank), float32.

    With a `magnitude`, shape (n_out,), it is a DoRA (https://arxiv.org/abs/2402.09353): each row is scaled to that
    length. PEFT stores both factors of an embedding transposed; here they have the shapes above.
    """

    module: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    on_embedding: bool = False

    def delta(self, start: int, rows: int) -> np.ndarray:
        """Rows `start … start+rows` of scale · B · A, shape (rows, n_in), float32."""
        change: np.ndarray = self.b[start : start + rows] @ self.a
        change *= np.float32(self.scale)
        return change

    def apply(self, start: int, rows: np.ndarray) -> np.ndarray:
        """The merged rows."""
        with np.errstate(all="ignore"):
            merged = self.delta(start, len(rows))
            merged += rows
            if self.magnitude is not None:
                length = np.sqrt(np.einsum("oi,oi->o", merged, merged))
                merged *= (self.magnitude[start : start + len(rows)] / length)[:, None]
        return merged


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A whole tensor in the adapter's file, readable and finite."""

    file: SafetensorsFile
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return self.tensor.shape

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows `start … start+count`, float32 of shape (count, n_in); a one-dimensional tensor is one row."""
        return self.file.rows(self.tensor, start, count)

    @property
    def array(self) -> np.ndarray:
        """The whole tensor, float32, read from the file at each use."""
        return self.rows(0, self.n_rows).reshape(self.shape)

    @property
    def n_rows(self) -> int:
        """The number of rows; a vector is one row."""
        return prod(self.shape[:-1])

    def slabs(self) -> Iterator[np.ndarray]:
        """Yield the tensor a slab of rows at a time."""
        step = max(1, SLAB_ELEMENTS // self.shape[-1])
        for start in range(0, self.n_rows, step):
            yield self.rows(start, min(step, self.n_rows - start))

    def equals(self, other: "SavedTensor") -> bool:
        """True if both hold the same numbers."""
        return self.shape == other.shape and all(map(np.array_equal, self.slabs(), other.slabs()))


@dataclass(frozen=True, eq=False)
class Replace:
    """Replaces the base's tensor by one that was trained whole.

    Row i becomes row (of a bias: number) `order[i]` of `saved`; `offset` is added to every value.
    """

    saved: SavedTensor
    order: np.ndarray | None = None
    offset: float = 0.0

    def apply(self, start: int, rows: np.ndarray) -> np.ndarray:
        """The saved rows."""
        if self.order is None:
            values = self.saved.rows(start, len(rows))
        elif len(self.saved.shape) == 1:
            values = self.saved.array[self.order].reshape(rows.shape)
        else:
            wanted = self.order[start : start + len(rows)]
            low = int(wanted.min())  # rows move within their head only, so this reads few extra rows
            values = self.saved.rows(low, int(wanted.max()) + 1 - low)[wanted - low]
        return values + np.float32(self.offset) if self.offset else values


@dataclass(frozen=True, eq=False)
class ReplaceRows:
    """Replaces single rows of an embedding: `ids` (n,), ascending, by `values` (n, n_in)."""

    ids: np.ndarray
    values: np.ndarray

    def apply(self, start: int, rows: np.ndarray) -> np.ndarray:
        """The rows, those of `ids` replaced."""
        first, last = np.searchsorted(self.ids, (start, start + len(rows)))
        if first == last:
            return rows
        replaced = rows.copy()
        replaced[self.ids[first:last] - start] = self.values[first:last]
        return replaced


@dataclass(frozen=True, eq=False)
class AddBias:
    """Adds a trained bias of B, shape (n_out,), to the base's bias: llama.cpp has one bias per layer."""

    values: np.ndarray

    def apply(self, start: int, rows: np.ndarray) -> np.ndarray:
        """The sum; a bias is one row."""
        with np.errstate(all="ignore"):
            shifted: np.ndarray = rows + self.values
        return shifted
