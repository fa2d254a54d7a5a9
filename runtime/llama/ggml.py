"""The parts of ggml that llama-cpp-python does not bind: tensors of a running computation, and float16 conversion.

`struct ggml_tensor` may change from release to release, so its layout is proved on tensors made for the purpose before
any other is read; ggml itself copies the numbers out, from the CPU's memory or a device's.

ggml converts float32 to float16 by its own loop, with the processor's instruction for it: 0.2 ns a number against
numpy's 2.9. Both round to the nearest, ties to even, so the bytes are the same.
"""

import ctypes
from typing import Any

import llama_cpp
import numpy as np

from runtime.errors import EngineError

_CONVERT = "ggml_cpu_fp32_to_fp16"
F32, _I32 = 0, 26
_DTYPES = {F32: np.dtype("<f4"), _I32: np.dtype("<i4")}
_OBJECT_BYTES = 32  # sizeof(struct ggml_object), which ggml_tensor_overhead() includes


def to_half(values: np.ndarray) -> np.ndarray:
    """The float32 array as float16 of the same shape. Values beyond the range of float16 become infinite."""
    # A build that loads its CPU backend as a library of its own does not export the function here.
    convert = getattr(llama_cpp.llama_cpp._lib, _CONVERT, None)
    if convert is None or values.dtype != np.float32:
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    source = np.ascontiguousarray(values)
    half = np.empty(source.shape, np.float16)
    convert(ctypes.c_void_p(source.ctypes.data), ctypes.c_void_p(half.ctypes.data), ctypes.c_int64(source.size))
    return half


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, ggml 0.25."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * 10),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions used here, and the numbers of the two operations that multiply by weights."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the functions and prove the layout. Raises EngineError when `library` is of another ggml."""
        pointer = ctypes.c_void_p
        try:
            self._init = _bind(library, "ggml_init", pointer, _InitParams)
            self._free = _bind(library, "ggml_free", None, pointer)
            self._new = _bind(library, "ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, *[ctypes.c_int64] * 3)
            self._mul_mat = _bind(library, "ggml_mul_mat", pointer, pointer, pointer, pointer)
            self._mul_mat_id = _bind(library, "ggml_mul_mat_id", pointer, pointer, pointer, pointer, pointer)
            self._set_name = _bind(library, "ggml_set_name", pointer, pointer, ctypes.c_char_p)
            self._overhead = _bind(library, "ggml_tensor_overhead", ctypes.c_size_t)
            self._n_bytes = _bind(library, "ggml_nbytes", ctypes.c_size_t, pointer)
            self._get = _bind(
                library, "ggml_backend_tensor_get", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t
            )
        except AttributeError as error:
            raise EngineError(f"this llama.cpp lacks a function that collecting needs: {error}") from error
        self.mul_mat, self.mul_mat_id = self._prove_layout()

    def read(self, tensor: GgmlTensor) -> np.ndarray:
        """A copy of a computed float32 or int32 tensor, shape (ne[3], ne[2], ne[1], ne[0]), strided as ggml has it."""
        n_bytes = self._n_bytes(ctypes.byref(tensor))
        copy = np.empty(n_bytes, np.uint8)
        self._get(ctypes.byref(tensor), copy.ctypes.data, 0, n_bytes)
        return np.ndarray(tuple(tensor.ne)[::-1], _DTYPES[tensor.type], copy.data, strides=tuple(tensor.nb)[::-1])

    def _prove_layout(self) -> tuple[int, int]:
        """Find the parts of two products, made of known tensors, where they should be; the two operations' numbers."""
        if self._overhead() != _OBJECT_BYTES + ctypes.sizeof(GgmlTensor):
            raise EngineError(
                f"this llama.cpp's tensors take {self._overhead() - _OBJECT_BYTES} bytes, {ctypes.sizeof(GgmlTensor)} "
                "were expected: importance matrices cannot be collected with it"
            )
        context = self._init(_InitParams(16 * self._overhead(), None, True))
        try:
            weights, inputs = self._new(context, F32, 3, 5, 1), self._new(context, F32, 3, 7, 1)
            experts, routes = self._new(context, F32, 3, 5, 2), self._new(context, _I32, 7, 4, 1)
            routed = self._new(context, F32, 3, 7, 4)
            self._set_name(weights, b"blk.0.proof.weight")
            product = GgmlTensor.from_address(self._mul_mat(context, weights, inputs))
            chosen = GgmlTensor.from_address(self._mul_mat_id(context, experts, routed, routes))
            _require(_address(product, 0) == weights and _address(product, 1) == inputs)
            _require(_address(chosen, 2) == routes and not product.src[2])
            _require(product.src[0].contents.name == b"blk.0.proof.weight")
            _require(tuple(product.ne) == (5, 7, 1, 1) and tuple(product.nb) == (4, 20, 140, 140))
            _require(chosen.src[0].contents.type == F32 and chosen.src[2].contents.type == _I32)
            _require(product.op != chosen.op)
            return product.op, chosen.op
        finally:
            self._free(context)


def _bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _address(tensor: GgmlTensor, source: int) -> int | None:
    return ctypes.cast(tensor.src[source], ctypes.c_void_p).value


def _require(holds: bool) -> None:
    if not holds:
        raise EngineError(
            "this llama.cpp lays out tensors differently: importance matrices cannot be collected with it"
        )
