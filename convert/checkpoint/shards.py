"""The weight files of a Hugging Face folder: one safetensors file, or shards with an index of tensor -> file.

Pickles are never opened: reading one runs the code in it. Weights that are quantized already are recognised by the
weights themselves. A setting is not believed over the data beside it: merging tools leave `quantization_config` beside
16-bit weights, and others (MLX, copied folders) quantize weights without writing one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import SourceInvalid
from models.common.files import PICKLE_SUFFIXES

from .config import read_json
from .safetensors import SafetensorsFile, StoredTensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
_NO_WEIGHTS = {"optimizer.pt", "scheduler.pt", "training_args.bin"}
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


@dataclass(frozen=True)
class Place:
    """The place of a tensor: its file, and its entry there."""

    file: SafetensorsFile
    tensor: StoredTensor


class Shards:
    """All weight files of a folder, open for reading. `places`: every tensor, file by file, ordered by name."""

    def __init__(self, folder: Path) -> None:
        """Open the files and check them against the index. Raises SourceInvalid naming the file or the tensor."""
        index = _read_index(folder)
        self._files: list[SafetensorsFile] = []
        try:
            for name in [WEIGHTS_FILE] if index is None else sorted(set(index.values())):
                self._files.append(_open(folder / name))
            self.places: Mapping[str, Place] = _places(self._files)
            if index is not None:
                _check_index(folder / INDEX_FILE, index, self.places)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _read_index(folder: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name; None for a folder with one weight file."""
    path = folder / INDEX_FILE
    single = (folder / WEIGHTS_FILE).is_file()
    if not path.is_file():
        if not single:
            raise SourceInvalid(_no_weights(folder))
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceInvalid(f"{str(path)!r} has no table 'weight_map'")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise SourceInvalid(f"{str(path)!r} says tensor {tensor!r} is in {name!r}, which is not a safetensors file")
    files = set(weight_map.values())
    if len(files) > MAX_SHARDS:
        raise SourceInvalid(f"{str(path)!r} names {len(files)} files, the limit is {MAX_SHARDS}")
    if single and WEIGHTS_FILE not in files:
        raise SourceInvalid(
            f"{str(folder)!r} holds {WEIGHTS_FILE!r} and the {len(files)} shards of {INDEX_FILE!r}: "
            "remove the one that is out of date"
        )
    return weight_map


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if parts := [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]:
        return f"{str(folder)!r} holds {parts[0]!r}, but no {INDEX_FILE!r}, which says what the shards must hold"
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES) and name not in _NO_WEIGHTS]:
        return (
            f"{str(folder)!r} holds its weights in {pickles[0]!r}, a pickle: opening it could run any code. "
            "Save them as safetensors: `model.save_pretrained(FOLDER, safe_serialization=True)`"
        )
    return f"{str(folder)!r} has no {WEIGHTS_FILE!r}"


def _open(path: Path) -> SafetensorsFile:
    if not path.is_file():
        raise SourceInvalid(f"{str(path)!r} is missing: {INDEX_FILE!r} names it; download it again")
    return SafetensorsFile(path)


def _places(files: list[SafetensorsFile]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in places:
                raise SourceInvalid(
                    f"tensor {name!r} is in both {str(places[name].file.path)!r} and {str(file.path)!r}"
                )
            places[name] = Place(file, tensor)
    return places


def _check_index(path: Path, index: Mapping[str, str], places: Mapping[str, Place]) -> None:
    for name, file in index.items():
        if name not in places or places[name].file.path.name != file:
            raise SourceInvalid(f"{str(path)!r} says tensor {name!r} is in {file!r}, where it is not")
    if extra := sorted(places.keys() - index.keys()):
        raise SourceInvalid(
            f"{str(places[extra[0]].file.path)!r} holds tensor {extra[0]!r}, which {INDEX_FILE!r} does not list"
        )


def _quantized_by(places: Mapping[str, Place]) -> tuple[str, str] | None:
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
    found = _quantized_by(places)
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
