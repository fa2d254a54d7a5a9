"""A checkpoint whose vocabulary is cut: the same source, of whose embedding and output rows only some are given."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from models.gguf.header import Header, TensorInfo

from .errors import TrimImpossible
from .source import Source
from .vocabulary import TrimPlan

_BY_TOKEN = ("token_embd.weight", "output.weight", "output.bias", "per_layer_token_embd.weight")


class TrimmedSource:
    """A `Source` over another, which it closes. The rows that stay are the other's, bit for bit and in its order."""

    def __init__(self, source: Source, plan: TrimPlan) -> None:
        """Raises TrimImpossible when a tensor has not one row for each token, or has and is not known to."""
        self._source = source
        self._kept = plan.kept
        tensors = {name: _trimmed(source.header, tensor, plan) for name, tensor in source.header.tensors.items()}
        self._header = replace(source.header, fields=plan.fields, tensors=tensors)

    @property
    def header(self) -> Header:
        """The header with the trimmed vocabulary, and the shapes that go with it."""
        return self._header

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """As `Source.slabs`: (first row, float32 array of shape (rows, n_in)), with cut rows left out."""
        whole = self._source.header.tensors[tensor.name]
        if tensor.name not in _BY_TOKEN:
            yield from self._source.slabs(whole)
        elif len(whole.shape) == 1:
            yield from ((start, slab[:, self._kept]) for start, slab in self._source.slabs(whole))
        else:
            yield from self._kept_rows(whole)

    def close(self) -> None:
        """Let go of the files."""
        self._source.close()

    def _kept_rows(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        for start, slab in self._source.slabs(tensor):
            first, last = np.searchsorted(self._kept, (start, start + len(slab)))
            if last > first:
                yield int(first), slab[self._kept[first:last] - start]


def _trimmed(header: Header, tensor: TensorInfo, plan: TrimPlan) -> TensorInfo:
    n_rows = tensor.shape[0]
    if tensor.name in _BY_TOKEN:
        if n_rows != plan.n_before:
            raise TrimImpossible(
                f"{str(header.path)!r}: tensor {tensor.name!r} has {n_rows} rows for {plan.n_before} tokens"
            )
        shape = (len(plan.kept), *tensor.shape[1:])
        return replace(tensor, shape=shape, n_bytes=tensor.n_bytes // n_rows * len(plan.kept))
    if n_rows == plan.n_before and not tensor.name.startswith("blk."):
        raise TrimImpossible(
            f"{str(header.path)!r}: tensor {tensor.name!r} seems to have a row for each token; known are "
            f"{', '.join(_BY_TOKEN)}"
        )
    return tensor
