"""Source tensor + LoRA -> the rows to be written. float32 arithmetic, a slab of rows in memory at a time."""

from collections.abc import Iterator

import numpy as np
from gguf.constants import GGMLQuantizationType

from models.gguf_header import TensorInfo

from .checkpoint import Checkpoint
from .errors import SourceInvalid
from .lora import Lora


def half_precision_kind(tensor: TensorInfo) -> GGMLQuantizationType:
    """F16 for matrices, F32 for what llama.cpp keeps so: one-dimensional tensors, norms and expert routers."""
    stays = len(tensor.shape) == 1 or tensor.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    return GGMLQuantizationType.F32 if stays else GGMLQuantizationType.F16


def merged_rows(checkpoint: Checkpoint, tensor: TensorInfo, lora: Lora | None) -> Iterator[np.ndarray]:
    """Yield the tensor's rows with the LoRA's change added, as float16 or float32 by `half_precision_kind`.

    Raises SourceInvalid when a value is not finite, or too large for float16.
    """
    dtype = np.float16 if half_precision_kind(tensor) == GGMLQuantizationType.F16 else np.float32
    for start, rows in checkpoint.slabs(tensor):
        if lora is not None:
            rows = rows + lora.delta(start, len(rows))  # a new array: rows of a float32 source are the file's
        with np.errstate(over="ignore"):
            out = rows.astype(dtype)
        if not np.isfinite(out).all():
            worst = float(np.abs(rows).max())
            raise SourceInvalid(
                f"tensor {tensor.name!r} cannot be written as {np.dtype(dtype).name}: "
                f"its largest magnitude is {worst:g}, the limit is {float(np.finfo(dtype).max):g}"
            )
        yield out
