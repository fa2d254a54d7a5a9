"""Read a safetensors file strictly, through a memory map: the weights of a Hugging Face checkpoint or a shard of it.

Rows come as float32, a slab at a time, copied out of the map, and the map's pages are then released: a 16 GB checkpoint
does not take 16 GB of memory. The `safetensors` library slices rows too (`safe_open(…).get_slice`), but needs ml_dtypes
for bfloat16, does not release the pages it has read, and does not name file and tensor in its errors.
Layout: https://github.com/huggingface/safetensors#format
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from convert.errors import SourceInvalid

MAX_HEADER_BYTES = 64 << 20
MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 1 << 48
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
# Types of the format; only the first three are accepted as weights.
_ELEMENT_BYTES: Mapping[str, int] = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
READABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file; `start` in bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def element_bytes(self) -> int:
        """The size of one number."""
        return _ELEMENT_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """The size of the tensor."""
        return prod(self.shape) * self.element_bytes


class SafetensorsFile:
    """A safetensors file, open for reading; close it when done. `tensors` are ordered by name."""

    def __init__(self, path: Path) -> None:
        """Map the file and check its header against its size. Raises SourceInvalid naming the file and the value."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise SourceInvalid(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # a file of no bytes cannot be mapped
            raise SourceInvalid(f"{str(path)!r} is not a safetensors file: it is empty") from error
        try:
            self.tensors: Mapping[str, StoredTensor] = self._read_header()
        except BaseException:
            self._data.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._data.close()

    def rows(self, tensor: StoredTensor, first: int, count: int) -> np.ndarray:
        """`count` rows from `first` on as float32 of shape (count, n_in); a one-dimensional tensor is one row.

        Raises SourceInvalid for a type that is not accepted as a weight, and for a value that is not finite.
        """
        if tensor.dtype not in READABLE:
            raise self._bad(f"has tensor {tensor.name!r} of type {tensor.dtype}; known are {', '.join(READABLE)}")
        width = tensor.shape[-1] if tensor.shape else 1
        row_bytes = width * tensor.element_bytes
        start, stop = tensor.start + first * row_bytes, tensor.start + (first + count) * row_bytes
        raw = self._data[start:stop]  # a copy, so that no array outlives the map
        self._release()
        if not _is_finite(raw, tensor.dtype):
            raise self._bad(_not_finite(tensor.name, _widen(raw, tensor.dtype)))
        return _widen(raw, tensor.dtype).reshape(count, width)

    def _release(self) -> None:
        """Release all pages, readahead included: they would count as this process's memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def _read_header(self) -> dict[str, StoredTensor]:
        size = len(self._data)
        length = int.from_bytes(self._data[:_LENGTH_BYTES], "little")
        if size < _LENGTH_BYTES or length > MAX_HEADER_BYTES:
            raise self._bad(
                f"is not a safetensors file: its header has {length} bytes, the limit is {MAX_HEADER_BYTES}"
            )
        data_start = _LENGTH_BYTES + length
        if data_start > size:
            raise self._bad(f"is truncated: its header ends at byte {data_start}, the file has {size}")
        entries = self._parse(self._data[_LENGTH_BYTES:data_start])
        tensors = {name: self._tensor(name, entry, data_start) for name, entry in entries.items() if name != _METADATA}
        self._check_places(tensors, data_start)
        return dict(sorted(tensors.items()))

    def _parse(self, encoded: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(encoded.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"is not a safetensors file: its header is not valid JSON ({error})") from error
        if not isinstance(parsed, dict):
            raise self._bad(f"is not a safetensors file: its header is a {type(parsed).__name__}")
        return parsed

    def _tensor(self, name: str, entry: Any, data_start: int) -> StoredTensor:
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, place = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
            raise self._bad(f"has tensor {name!r} of the unknown type {dtype!r}")
        if not _is_counts(shape, MAX_DIMENSIONS) or prod(shape) > _MAX_ELEMENTS:
            raise self._bad(f"has tensor {name!r} of the impossible shape {shape!r}")
        if not _is_counts(place, 2) or len(place) != 2:
            raise self._bad(f"has tensor {name!r} at the impossible place {place!r}")
        tensor = StoredTensor(name, dtype, tuple(shape), data_start + place[0])
        if place[1] - place[0] != tensor.n_bytes:
            raise self._bad(
                f"has tensor {name!r} in {place[1] - place[0]} bytes; "
                f"{dtype} of shape {tensor.shape} has {tensor.n_bytes}"
            )
        return tensor

    def _check_places(self, tensors: Mapping[str, StoredTensor], data_start: int) -> None:
        expected = data_start
        for tensor in sorted(tensors.values(), key=lambda found: (found.start, found.n_bytes)):
            if tensor.start != expected:
                raise self._bad(
                    f"has tensor {tensor.name!r} at byte {tensor.start}, the one before it ends at {expected}: "
                    "tensors must neither overlap nor leave holes"
                )
            expected += tensor.n_bytes
        if expected > len(self._data):
            raise self._bad(f"is truncated: its tensors end at byte {expected}, the file has {len(self._data)}")
        if expected < len(self._data):
            raise self._bad(f"has {len(self._data) - expected} bytes after its last tensor")

    def _bad(self, what: str) -> SourceInvalid:
        return SourceInvalid(f"{str(self.path)!r} {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _is_counts(value: Any, most: int) -> TypeGuard[list[int]]:
    """True for a list of at most `most` integers of 0 or more."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 62 for count in value)
    )


def _widen(raw: bytes, dtype: str) -> np.ndarray:
    """The numbers in `raw` as float32. bfloat16, which numpy lacks, is the upper half of a float32."""
    if dtype == "BF16":
        wide: np.ndarray = np.left_shift(np.frombuffer(raw, dtype="<u2"), 16, dtype=np.uint32)
        return wide.view(np.float32)
    return np.frombuffer(raw, dtype="<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _is_finite(raw: bytes, dtype: str) -> bool:
    """False if any exponent is all ones; several times faster than numpy's isfinite on half floats."""
    mask = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}[dtype]
    bits = np.frombuffer(raw, dtype="<u4" if dtype == "F32" else "<u2")
    return bits.size == 0 or int((bits & bits.dtype.type(mask)).max()) != mask


def _not_finite(name: str, values: np.ndarray) -> str:
    count = int((~np.isfinite(values)).sum())
    kind = "NaN" if np.isnan(values).any() else "infinite"
    return f"has {count} values in tensor {name!r} that are not finite ({kind}): the checkpoint is damaged"
