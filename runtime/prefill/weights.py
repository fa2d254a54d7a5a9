"""The weights of a GGUF file that get panels, and panels made from the file's own bytes.

llama.cpp may hold its weights repacked, in layouts of its own. Decode rows keep those; panels come from the file.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from models.errors import BadGguf
from models.gguf.header import TensorInfo, read_tensors

from .build import Unavailable
from .library import Panels

BLOCK, COLUMNS = 32, 16
PANEL_BLOCK_BYTES = 544
"""Bytes of 32 × 16 quantized weights: int8, and a float16 scale per 32."""
PLAIN = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
"""Types that stay llama.cpp's: int8 would be coarser than it computes with them."""


def matrices(path: Path) -> tuple[TensorInfo, ...]:
    """The matrices that a prompt's rows are multiplied by. Raises Unavailable if the file cannot be read.

    The embedding and the output stay llama.cpp's: rows of logits are few, and theirs are the largest matrices.
    """
    try:
        fields, tensors = read_tensors(path)
    except (BadGguf, OSError) as error:
        raise Unavailable(str(error)) from error
    if (split := fields.get("split.count")) is not None and split.value not in (0, 1):
        raise Unavailable("the model is split into several files")
    return tuple(tensor for tensor in tensors.values() if _multiplies(tensor))


def panel_bytes(tensors: Iterable[TensorInfo]) -> int:
    """The memory that panels of `tensors` take, in bytes."""
    shapes = (tensor.shape for tensor in tensors)
    return sum(-(-n_cols // COLUMNS) * (n_k // BLOCK) * PANEL_BLOCK_BYTES for n_cols, n_k in shapes)


def add_all(panels: Panels, path: Path, tensors: Iterable[TensorInfo], n_threads: int) -> None:
    """Make panels of `tensors` of the file. Raises Unavailable if none can be made."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise Unavailable(f"{str(path)!r} cannot be mapped: {error}") from error
    for tensor in tensors:
        n_cols, n_k = tensor.shape
        part = data[tensor.offset : tensor.offset + tensor.n_bytes]
        panels.add(tensor.name, int(tensor.kind), n_k, n_cols, part, n_threads)
    if panels.n_weights == 0:
        raise Unavailable("the model's weights are not quantized")


def _multiplies(tensor: TensorInfo) -> bool:
    named = tensor.name.startswith("blk.") and tensor.name.endswith(".weight")
    shaped = len(tensor.shape) == 2 and min(tensor.shape) > 1 and tensor.shape[-1] % BLOCK == 0
    return named and shaped and tensor.kind not in PLAIN
