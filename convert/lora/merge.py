"""A checkpoint with an adapter merged into it; and a checkpoint's rows as a GGUF file stores them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from gguf.constants import GGMLQuantizationType

from convert.checkpoint.source import Checkpoint
from convert.errors import SourceInvalid
from models.gguf.header import Header, TensorInfo
from runtime.llama.ggml import to_half

from .fit import EMBEDDING, HEAD, Fitted


class MergedCheckpoint:
    """`source` with the changes of `fitted` applied, a slab of rows at a time. Closing it closes `source`."""

    def __init__(self, source: Checkpoint, fitted: Fitted) -> None:
        self._source = source
        self._changes = fitted.changes
        self._header = merged_header(source.header, fitted)

    @property
    def header(self) -> Header:
        """The source's header, with an output head if the adapter unties it."""
        return self._header

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) of the merged tensor until it is read."""
        # a head that was tied starts as the embedding
        origin = self._source.header.tensors.get(tensor.name) or self._source.header.tensors[EMBEDDING]
        for start, rows in self._source.slabs(origin):
            for change in self._changes.get(tensor.name, ()):
                rows = change.apply(start, rows)
            yield start, rows

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def merged_header(header: Header, fitted: Fitted) -> Header:
    """`header`, with an output head of the embedding's shape and type if `fitted` unties it."""
    if not fitted.unties:
        return header
    return replace(header, tensors={**header.tensors, HEAD: replace(header.tensors[EMBEDDING], name=HEAD)})


def half_precision_kind(tensor: TensorInfo) -> GGMLQuantizationType:
    """F16 for matrices, F32 for tensors that llama.cpp keeps in it: one-dimensional ones, norms, expert routers."""
    stays = len(tensor.shape) == 1 or tensor.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    return GGMLQuantizationType.F32 if stays else GGMLQuantizationType.F16


def file_rows(source: Checkpoint, tensor: TensorInfo, kind: GGMLQuantizationType | None = None) -> Iterator[np.ndarray]:
    """Yield the tensor's rows as `kind` (F16 or F32), by default `half_precision_kind`.

    Raises SourceInvalid when a value is not finite or too large for float16.
    """
    wanted = half_precision_kind(tensor) if kind is None else kind
    dtype = np.float16 if wanted == GGMLQuantizationType.F16 else np.float32
    for _, rows in source.slabs(tensor):
        out = to_half(rows) if dtype == np.float16 else rows
        if not _is_finite(out):
            worst = float(np.abs(rows).max())
            raise SourceInvalid(
                f"tensor {tensor.name!r} cannot be written as {np.dtype(dtype).name}: "
                f"its largest magnitude is {worst:g}, the limit is {float(np.finfo(dtype).max):g}"
            )
        yield out


def _is_finite(values: np.ndarray) -> bool:
    """False if any exponent is all ones; many times faster than numpy's isfinite on half floats."""
    if values.dtype == np.float16:
        return int((values.view(np.uint16) & np.uint16(0x7C00)).max()) != 0x7C00
    return int((values.view(np.uint32) & np.uint32(0x7F80_0000)).max()) != 0x7F80_0000
