"""Recognise weights that are quantized already, by the weights themselves.

A setting is not believed over the data beside it: merging tools leave `quantization_config` beside 16-bit weights, and
others (MLX, copied folders) quantize weights without writing one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import SourceInvalid

from .shards import Place

# Endings of names that only quantized weights have -> the tool or the format.
_ENDINGS: Mapping[str, str] = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".g_idx": "GPTQ",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    "_blocks": "MXFP4",
    ".biases": "MLX",
}
_WAYS: Mapping[str, str] = {
    "bitsandbytes": "load it with transformers, call `model.dequantize()`, then `save_pretrained`; or better, ",
    "MLX": "write it with `mlx_lm.convert --dequantize`, or `mlx_lm.fuse --dequantize`; or better, ",
}
# Types in which quantized matrices are stored -> what such a matrix is called.
_PACKED: Mapping[str, str] = {
    "F8_E4M3": "FP8",
    "F8_E5M2": "FP8",
    **{dtype: f"a tool that stores {dtype}" for dtype in ("U8", "I8", "I32", "U32")},
}
_MODELOPT = "hf_quant_config.json"


def quantized_by(places: Mapping[str, Place]) -> tuple[str, str] | None:
    """The tool that quantized the weights, and a tensor that shows it; None for plain weights."""
    for ending, tool in _ENDINGS.items():
        for name in places:
            if name.endswith(ending) or (tool == "bitsandbytes" and ".quant_state." in name):
                return tool, name
    for name, place in places.items():
        if name.endswith(".weight") and place.tensor.dtype in _PACKED:
            return _PACKED[place.tensor.dtype], name
    return None


def check_plain(folder: Path, raw: Mapping[str, Any], places: Mapping[str, Place]) -> tuple[str, ...]:
    """A warning if config.json calls plain weights quantized. Raises SourceInvalid for quantized ones."""
    stated = raw.get("quantization_config") or raw.get("compression_config") or raw.get("quantization")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    found = quantized_by(places)
    if found is not None:
        tool, tensor = found
        named = (
            f"{tool}, by tensor {tensor!r}" if method is None or method in tool.lower() else f"{method}, by {tensor!r}"
        )
        raise SourceInvalid(
            f"{str(folder)!r}: the weights are quantized already ({named}), and another quantization of them would "
            f"lose twice; {_WAYS.get(str(method or tool), '')}convert the full-precision checkpoint they were made from"
        )
    if stated or (folder / _MODELOPT).is_file():
        where = "config.json" if stated else _MODELOPT
        return (f"{where} says that the weights are quantized ({method or 'by an unnamed method'}), but they are not",)
    return ()
