"""A base with an adapter merged into it, a source like any other; and the rows of a source as a file has them."""

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
    """`source` with the changes of `fitted` made to it, a slab of rows at a time; closing it closes `source`."""

    def __init__(self, source: Checkpoint, fitted: Fitted) -> None:
        self._source = source
        self._changes = fitted.changes
        self._header = merged_header(source.header, fitted)

    @property
    def header(self) -> Header:
        """The source's own, with an output head where the adapter unties it."""
        return self._header

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) of the merged tensor until it is read."""
        # a head that was tied begins as the embedding
        origin = self._source.header.tensors.get(tensor.name) or self._source.header.tensors[EMBEDDING]
        for start, rows in self._source.slabs(origin):
            for change in self._changes.get(tensor.name, ()):
                rows = change.apply(start, rows)
            yield start, rows

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def merged_header(header: Header, fitted: Fitted) -> Header:
    """`header`, with an output head like the embedding where `fitted` unties it."""
    if not fitted.unties:
        return header
    return replace(header, tensors={**header.tensors, HEAD: replace(header.tensors[EMBEDDING], name=HEAD)})


def half_precision_kind(tensor: TensorInfo) -> GGMLQuantizationType:
    """F16 for matrices, F32 for what llama.cpp keeps so: one-dimensional tensors, norms and expert routers."""
    stays = len(tensor.shape) == 1 or tensor.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    return GGMLQuantizationType.F32 if stays else GGMLQuantizationType.F16


def file_rows(source: Checkpoint, tensor: TensorInfo, kind: GGMLQuantizationType | None = None) -> Iterator[np.ndarray]:
    """Yield the tensor's rows as float16 or float32: as `kind` (F16 or F32) says, or else `half_precision_kind`.

    Raises SourceInvalid when a value is not finite, or too large for float16.
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
    """False if any exponent is all ones, seen in the bits: numpy's isfinite of half floats takes many times longer."""
    if values.dtype == np.float16:
        return int((values.view(np.uint16) & np.uint16(0x7C00)).max()) != 0x7C00
    return int((values.view(np.uint32) & np.uint32(0x7F80_0000)).max()) != 0x7F80_0000
