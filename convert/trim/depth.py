"""Cut a model's depth: a checkpoint without some of its layers, for a task that needs fewer.

Hidden states keep their width through all layers, so that a layer's output fits any later layer, and the output matrix.
What is left computes a text model only after it was trained again.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from convert.checkpoint.source import Checkpoint
from convert.errors import RequestInvalid
from models.gguf.fields import Field
from models.gguf.header import Header, TensorInfo

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
# By which layers llama.cpp knows a window where the file does not say: all but every n-th.
_PERIODS = {"gemma2": 2, "gemma3": 6}


class ShallowCheckpoint:
    """`source` with only the layers `kept`, in their order. Closing it closes `source`."""

    def __init__(self, source: Checkpoint, kept: Sequence[int]) -> None:
        """Raise RequestInvalid for a layer that is not there, or not in ascending order, and for none."""
        header = source.header
        n_layers = header.integer(f"{header.architecture}.block_count")
        if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= n_layers:
            raise RequestInvalid(f"layers {list(kept)} of {n_layers}: give some of 0 … {n_layers - 1}, ascending")
        self._source = source
        self._origins: dict[str, TensorInfo] = {}
        places = {layer: place for place, layer in enumerate(kept)}
        for name, tensor in header.tensors.items():
            match = _LAYER.fullmatch(name)
            if match is None:
                self._origins[name] = tensor
            elif (layer := int(match[1])) in places:
                self._origins[f"blk.{places[layer]}.{match[2]}"] = tensor
        tensors = {name: replace(tensor, name=name) for name, tensor in self._origins.items()}
        self._header = replace(header, fields=_fields(header, kept, n_layers), tensors=tensors)

    @property
    def header(self) -> Header:
        """The header with the layers that stay, numbered from 0."""
        return self._header

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """As `Checkpoint.slabs`."""
        yield from self._source.slabs(self._origins[tensor.name])

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def _fields(header: Header, kept: Sequence[int], n_layers: int) -> dict[str, Field]:
    """The fields with the new number of layers; arrays of one number for each layer lose those of the others."""
    arch = header.architecture
    fields = dict(header.fields)
    for key, field in header.fields.items():
        if key.startswith(f"{arch}.") and field.length == n_layers and (numbers := field.numbers) is not None:
            left = [numbers[layer] for layer in kept]
            if all(isinstance(number, bool) for number in left):
                fields[key] = Field.boolean_array([bool(number) for number in left])
            elif all(isinstance(number, int) for number in left):
                fields[key] = Field.int32_array([int(number) for number in left])
            else:
                fields[key] = Field.float32_array(left)
    if f"{arch}.{_WINDOW}" in fields and f"{arch}.{_PATTERN}" not in fields and arch in _PERIODS:
        windowed = [(layer + 1) % _PERIODS[arch] != 0 for layer in kept]
        fields[f"{arch}.{_PATTERN}"] = Field.boolean_array(windowed)
    fields[f"{arch}.block_count"] = Field.uint32(len(kept))
    return fields
