"""Child process that quantizes: one call of `llama_model_quantize`, with a line for each step and each error."""

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from convert.child import read_job, tell

from .imatrix import read_imatrix

_LOG_ERROR = 4
_LOGGED_STEP = re.compile(rb"\[ *(\d+)/ *(\d+)\]")


def main() -> int:
    """Run the job. Returns llama.cpp's code as the exit code."""
    job = read_job()
    callback = llama_cpp.llama_log_callback(_log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = job["ftype"]
    if job["kinds"]:
        options.tt_overrides = _overrides(job["kinds"])
    weights = _importance(Path(job["imatrix"])) if job["imatrix"] is not None else {}
    if weights:
        options.imatrix = _imatrix_data(weights)
    source, target = os.fsencode(job["source"]), os.fsencode(job["target"])
    code: int = llama_cpp.llama_model_quantize(source, target, ctypes.byref(options))
    return code


def _overrides(kinds: Mapping[str, int]) -> Any:
    """An array that ends with a null pattern. A pattern is a full name: regex dialects do not matter."""
    array = (llama_cpp.llama_model_tensor_override * (len(kinds) + 1))()
    for item, (name, kind) in zip(array, kinds.items(), strict=False):
        item.pattern = f"^{re.escape(name)}$".encode()
        item.type = kind
    return array


def _importance(path: Path) -> dict[str, np.ndarray]:
    return {name: entry.importance for name, entry in read_imatrix(path).entries.items()}


def _imatrix_data(weights: Mapping[str, np.ndarray]) -> Any:
    """An array that ends with a null name. It points into `weights`, which must outlive it."""
    array = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for item, (name, values) in zip(array, weights.items(), strict=False):
        item.name = name.encode()
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        item.size = values.size
    return array


def _log(level: int, text: bytes, _: object) -> None:
    if match := _LOGGED_STEP.match(text):
        tell(int(match[1]), int(match[2]))
    elif level == _LOG_ERROR:
        tell(text.decode(errors="replace").strip())


if __name__ == "__main__":
    sys.exit(main())
