"""A PEFT LoRA adapter: read from its folder, fitted to a base, merged as W + scale · B · A in float32.

Everything is checked before anything is written: an adapter for another base, a half-copied file or a variant whose
merge is not this formula would otherwise give a model that loads, runs and babbles.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, deserialize

from models.gguf_header import Header

from .architectures import Family
from .errors import AdapterInvalid
from .lora_config import LoraConfig, read_config

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Lora:
    """The change of one module: `scale * b @ a`, with a of shape (rank, n_in) and b of shape (n_out, rank), float32."""

    module: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    def delta(self, start: int, rows: int) -> np.ndarray:
        """Rows `start … start+rows` of the change, shape (rows, n_in), float32."""
        change: np.ndarray = (self.b[start : start + rows] @ self.a) * np.float32(self.scale)
        return change


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder has it. `rank` is the configuration's; single modules may have another."""

    folder: Path
    sha256: str
    rank: int
    loras: Mapping[str, Lora]

    @property
    def is_zero(self) -> bool:
        """Whether merging changes nothing (PEFT starts with B = 0, so this is an adapter that was never trained)."""
        return not any(np.any(lora.b) and np.any(lora.a) for lora in self.loras.values())


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder. Raises AdapterInvalid naming the file, the setting or the tensor that is wrong."""
    config = read_config(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        hint = f"; {pickled.name!r} is a pickle and is not opened: save it as safetensors" if pickled.exists() else ""
        raise AdapterInvalid(f"{str(folder)!r} has no {WEIGHTS_FILE!r}{hint}")
    try:
        data = file.read_bytes()
        tensors = cast(Any, deserialize)(data)  # its stub has no types
    except OSError as error:
        raise AdapterInvalid(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise AdapterInvalid(f"{str(file)!r} is truncated or no safetensors file: {error}") from error
    arrays = {name: _widen(name, spec["dtype"], spec["shape"], spec["data"]) for name, spec in tensors}
    if not arrays:
        raise AdapterInvalid(f"{str(file)!r} holds no tensors")
    return Adapter(folder, hashlib.sha256(data).hexdigest(), config.rank, _pair(arrays, config))


def fit(adapter: Adapter, header: Header, family: Family) -> dict[str, Lora]:
    """GGUF tensor name -> its change, with rows in the GGUF's order. Raises AdapterInvalid naming the misfit."""
    fitted: dict[str, Lora] = {}
    for module, lora in adapter.loras.items():
        name = _target(module, header, family)
        wanted = header.tensors[name].shape
        if (lora.b.shape[0], lora.a.shape[1]) != wanted:
            raise AdapterInvalid(
                f"adapter tensors of {module!r} make a change of shape {(lora.b.shape[0], lora.a.shape[1])}, "
                f"{name!r} of the base has {wanted}: the adapter was trained on another model"
            )
        fitted[name] = Lora(module, lora.a, family.repack_rows(module, lora.b, header), lora.scale)
    return fitted


def _target(module: str, header: Header, family: Family) -> str:
    name = family.tensor_name(module)
    if name is None:
        raise AdapterInvalid(f"adapter target {module!r} is no linear layer of {family.architecture!r} that is known")
    if name in header.tensors:
        return name
    if name == "output.weight":
        raise AdapterInvalid(
            f"adapter target {module!r} cannot be merged: this base ties it to the embedding, which would change too"
        )
    layers = header.integer(f"{family.architecture}.block_count")
    raise AdapterInvalid(f"adapter target {module!r} is not in the base, which has {layers} layers and no {name!r}")


def _widen(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """The tensor as finite float32. numpy has no bfloat16: its 16 bits are the upper half of a float32."""
    if dtype == "BF16":
        array = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in {"F16", "F32"}:
        array = np.frombuffer(data, dtype="<f2" if dtype == "F16" else "<f4").astype(np.float32)
    else:
        raise AdapterInvalid(f"adapter tensor {name!r} has type {dtype}; known are BF16, F16 and F32")
    if not np.isfinite(array).all():
        raise AdapterInvalid(
            f"adapter tensor {name!r} has {int((~np.isfinite(array)).sum())} values that are not finite"
        )
    return array.reshape(shape)


def _pair(arrays: Mapping[str, np.ndarray], config: LoraConfig) -> dict[str, Lora]:
    modules: dict[str, Lora] = {}
    for name in sorted(arrays):
        if not name.startswith(_PREFIX) or not name.endswith((_A, _B)):
            raise AdapterInvalid(
                f"adapter tensor {name!r} is not supported: only LoRA pairs of linear layers "
                f"('{_PREFIX}…{_A}' and '…{_B}') can be merged"
            )
        stem = name.removesuffix(_A).removesuffix(_B)
        for suffix in (_A, _B):
            if stem + suffix not in arrays:
                raise AdapterInvalid(f"adapter tensor {stem + suffix!r} is missing")
        module = stem.removeprefix(_PREFIX)
        if module not in modules:
            modules[module] = _lora(module, arrays[stem + _A], arrays[stem + _B], config)
    return modules


def _lora(module: str, a: np.ndarray, b: np.ndarray, config: LoraConfig) -> Lora:
    rank = config.rank_of(module)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterInvalid(
            f"adapter tensors of {module!r} have shapes A {a.shape} and B {b.shape}; "
            f"with rank {rank} they must be ({rank}, n_in) and (n_out, {rank})"
        )
    return Lora(module, a, b, config.scale_of(module))
