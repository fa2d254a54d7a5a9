"""A half-precision GGUF -> a quantized one, through llama.cpp's `llama_model_quantize`.

It runs in a process of its own: the C call cannot be interrupted and would take us with it if it aborted, and Ctrl-C
has to end a conversion at once.
"""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import QuantizationUnknown, QuantizeFailed

DEFAULT_QUANTIZATION = "Q8_0"
HALF_PRECISION = "F16"

# name -> llama.cpp's llama_ftype
QUANTIZATIONS: Mapping[str, int] = {
    HALF_PRECISION: 1,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_0": 2,
    "IQ4_NL": 25,
}
# Rows that do not fit a K-quant's block of 256 fall back to wider types: no more than Q8_0's 8.5 bits a weight.
_MOST_BITS = 8.5
_LOG_ERROR = 4
_LOGGED_STEP = re.compile(rb"\[ *(\d+)/ *(\d+)\]")
_STEP = re.compile(r"(\d+) (\d+)")


def check_quantization(name: str) -> str:
    """The name as we spell it. Raises QuantizationUnknown naming the known ones."""
    if name.upper() not in QUANTIZATIONS:
        raise QuantizationUnknown(f"unknown quantization {name!r}; known are {', '.join(QUANTIZATIONS)}")
    return name.upper()


def disk_need(file_bytes: int, matrix_bytes: int, quantization: str) -> int:
    """Bytes for the half-precision file, `matrix_bytes` of it F16 matrices, and the largest quantized one."""
    return file_bytes if quantization == HALF_PRECISION else 2 * file_bytes - int(matrix_bytes * (1 - _MOST_BITS / 16))


def quantize(source: Path, target: Path, quantization: str, progress: Callable[[int, int], None]) -> None:
    """Write `source` quantized to `target`. `progress` is told (tensors done, tensors in all).

    Raises QuantizeFailed with llama.cpp's last error; an interrupted or failed run leaves no `target`.
    """
    # -P: a folder called `convert` where the user stands must not be taken for ours
    command = [sys.executable, "-P", "-m", "convert.quantize", str(source), str(target), quantization]
    complaint = "no word from it"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if match := _STEP.fullmatch(line.strip()):
                    progress(int(match[1]), int(match[2]))
                elif line.strip():
                    complaint = line.strip()
            code = child.wait()
        except BaseException:
            child.kill()
            target.unlink(missing_ok=True)
            raise
    if code != 0 or not target.is_file():
        target.unlink(missing_ok=True)
        raise QuantizeFailed(
            f"{source.name!r} could not be quantized to {quantization} (exit code {code}): {complaint}"
        )


def _call(source: str, target: str, quantization: str) -> int:
    """In the child: quantize, with a line for each step and each error. Returns 0 when done."""
    import llama_cpp

    def log(level: int, text: bytes, _: object) -> None:
        try:
            if match := _LOGGED_STEP.match(text):
                print(int(match[1]), int(match[2]), flush=True)
            elif level == _LOG_ERROR:
                print(text.decode(errors="replace").strip(), flush=True)
        except BrokenPipeError:
            os._exit(1)  # nobody waits for the result any more

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = QUANTIZATIONS[quantization]
    code: int = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(options))
    return code


if __name__ == "__main__":
    sys.exit(_call(*sys.argv[1:]))
