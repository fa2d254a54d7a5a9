"""LoRA adapters of one loaded model: opened with it, applied to its context one at a time.

llama.cpp applies an adapter to a whole decode. After a change it reserves the context's compute buffers again.
"""

import copy
import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp

from runtime.errors import EngineError, LoadFailed

from .handle import ModelHandle, check_file, last_errors, reason


class Adapters:
    """The adapters by name. The weights belong to the model and are freed with it."""

    def __init__(self, model: ModelHandle, paths: Mapping[str, Path]) -> None:
        """Open LoRA GGUF files, before there is a context. Raises LoadFailed with llama.cpp's reason."""
        self._pointers = {name: _open(model, name, path) for name, path in paths.items()}
        self._applied: str | None = None

    def again(self) -> "Adapters":
        """The same adapters, for another context of the model."""
        other = copy.copy(self)
        other._applied = None
        return other

    def apply(self, context: Any, name: str | None) -> None:
        """Make `context` compute with adapter `name` (None: with none). Costs nothing if it does already."""
        if name == self._applied:
            return
        chosen = [] if name is None else [self._pointers[name]]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*(1.0 for _ in chosen))
        code = llama_cpp.llama_set_adapters_lora(context, pointers, len(chosen), scales)
        if code != 0:
            raise EngineError(f"llama_set_adapters_lora gave {code} for adapter {name!r}")
        self._applied = name


def _open(model: ModelHandle, name: str, path: Path) -> Any:
    check_file(path)
    with last_errors() as errors:
        pointer = llama_cpp.llama_adapter_lora_init(model.pointer, str(path).encode())
    if not pointer:
        raise LoadFailed(f"adapter {name!r} ({str(path)!r}) cannot be loaded: {reason(errors)}")
    return pointer
