"""The parts of ggml that llama-cpp-python does not bind: tensors of a running computation, float16, lazy buffers.

`struct ggml_tensor` may change from release to release, so its layout is proved on tensors made for the purpose before
any other is read; ggml itself copies the numbers out, from the CPU's memory or a device's.

ggml converts float32 to float16 by its own loop, with the processor's instruction for it: 0.2 ns a number against
numpy's 2.9. Both round to the nearest, ties to even, so the bytes are the same.

llama.cpp allocates a KV cache for the longest sequences in every stream and writes zeros over all of it. Pages of
memory that were never written to cost nothing and read as zeros, so a lazy buffer is cleared by giving its pages back
(Linux: `madvise(MADV_DONTNEED)`), when it is made and whenever the whole cache is cleared. ggml calls both functions
through tables of pointers: `alloc_buffer` of the CPU's buffer type, replaced while a context is made, and `clear` of
each large buffer. The tables may change from release to release, so their layout is proved on a small buffer first. If
it is another, or the system is, everything stays as it is.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from runtime.errors import EngineError

# Smaller buffers may lie in memory that is shared with others, and are not worth it.
LARGE_BYTES = 64 << 20
_POINTER = ctypes.sizeof(ctypes.c_void_p)
_ALLOC_PLACE = 1  # get_name, alloc_buffer …
_CLEAR_PLACES = (9, 7)  # free_buffer, get_base, init_tensor, memset/set/get_tensor, (set/get_2d,) cpy_tensor, clear …
_DONT_NEED, _NO_HUGE_PAGES = 4, 15
_ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_CLEAR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint8)
_CONVERT = "ggml_cpu_fp32_to_fp16"
F32, _F16, _I32 = 0, 1, 26
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
    """The functions used here, and the numbers of the operations that multiply by weights, and of attention."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the functions and prove the layout. Raises EngineError when `library` is of another ggml."""
        pointer = ctypes.c_void_p
        try:
            self._init = _bind(library, "ggml_init", pointer, _InitParams)
            self._free = _bind(library, "ggml_free", None, pointer)
            self._new = _bind(library, "ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, *[ctypes.c_int64] * 3)
            self._mul_mat = _bind(library, "ggml_mul_mat", pointer, pointer, pointer, pointer)
            self._mul_mat_id = _bind(library, "ggml_mul_mat_id", pointer, pointer, pointer, pointer, pointer)
            self._attention = _bind(library, "ggml_flash_attn_ext", pointer, *[pointer] * 5, *[ctypes.c_float] * 3)
            self._set_name = _bind(library, "ggml_set_name", pointer, pointer, ctypes.c_char_p)
            self._overhead = _bind(library, "ggml_tensor_overhead", ctypes.c_size_t)
            self._n_bytes = _bind(library, "ggml_nbytes", ctypes.c_size_t, pointer)
            self._get = _bind(
                library, "ggml_backend_tensor_get", None, pointer, pointer, ctypes.c_size_t, ctypes.c_size_t
            )
        except AttributeError as error:
            raise EngineError(f"this llama.cpp lacks a function that collecting needs: {error}") from error
        self.mul_mat, self.mul_mat_id, self.attention = self._prove_layout()

    def read(self, tensor: GgmlTensor) -> np.ndarray:
        """A copy of a computed float32 or int32 tensor, shape (ne[3], ne[2], ne[1], ne[0]), strided as ggml has it."""
        n_bytes = self._n_bytes(ctypes.byref(tensor))
        copy = np.empty(n_bytes, np.uint8)
        self._get(ctypes.byref(tensor), copy.ctypes.data, 0, n_bytes)
        return np.ndarray(tuple(tensor.ne)[::-1], _DTYPES[tensor.type], copy.data, strides=tuple(tensor.nb)[::-1])

    def _prove_layout(self) -> tuple[int, int, int]:
        """Find the parts of operations on known tensors where they should be. Returns the operations' numbers."""
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
            mask = self._new(context, _F16, 5, 7, 1)
            attention = GgmlTensor.from_address(self._attention(context, inputs, weights, weights, mask, 0.5, 0.0, 2.0))
            _require([_address(attention, place) for place in range(5)] == [inputs, weights, weights, mask, None])
            _require(attention.op_params[0] == _bits(0.5) and attention.op_params[2] == _bits(2.0))
            _require(tuple(attention.ne) == (3, 1, 7, 1) and len({product.op, chosen.op, attention.op}) == 3)
            return product.op, chosen.op, attention.op
        finally:
            self._free(context)


def _bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


def _address(tensor: GgmlTensor, source: int) -> int | None:
    return ctypes.cast(tensor.src[source], ctypes.c_void_p).value


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _require(holds: bool) -> None:
    if not holds:
        raise EngineError(
            "this llama.cpp lays out tensors differently: importance matrices cannot be collected with it"
        )


@contextmanager
def lazy_buffers(*, wanted: bool) -> Iterator[bool]:
    """Make the CPU's large buffers that are allocated in the block lazy. Gives True if they will be."""
    tables = _buffer_tables() if wanted else None
    if tables is None:
        yield False
        return
    place = ctypes.c_void_p.from_address(tables.buffer_type + _ALLOC_PLACE * _POINTER)
    before = place.value or 0
    allocate = _ALLOC(before)

    def allocate_lazy(buffer_type: int, n_bytes: int) -> int | None:
        buffer: int | None = allocate(buffer_type, n_bytes)
        if buffer and n_bytes >= LARGE_BYTES:
            tables.make_lazy(buffer, n_bytes)
        return buffer

    replacement = _ALLOC(allocate_lazy)
    place.value = ctypes.cast(replacement, ctypes.c_void_p).value
    try:
        yield True
    finally:
        place.value = before


class _BufferTables:
    """ggml's functions for buffers, and the place of `clear` in their tables."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises AttributeError if the library lacks a function, LookupError if its tables are not as expected."""
        self._base = _function(library.ggml_backend_buffer_get_base, ctypes.c_void_p, ctypes.c_void_p)
        self._clear = _function(library.ggml_backend_buffer_clear, None, ctypes.c_void_p, ctypes.c_uint8)
        self._allocate = _function(
            library.ggml_backend_buft_alloc_buffer, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
        )
        self._free = _function(library.ggml_backend_buffer_free, None, ctypes.c_void_p)
        self.buffer_type: int = _function(library.ggml_backend_cpu_buffer_type, ctypes.c_void_p)()
        self._madvise = _function(
            ctypes.CDLL(None).madvise, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        )
        self._place = self._proved_place()
        self._callback = _CLEAR(self._clear_lazy)
        self._sizes: dict[int, int] = {}

    def make_lazy(self, buffer: int, n_bytes: int) -> None:
        """Clear `buffer` from now on by giving its pages back."""
        self._sizes[buffer] = n_bytes
        start, end = self._pages(buffer)
        self._madvise(start, end - start, _NO_HUGE_PAGES)
        self._slot(buffer, self._place).value = ctypes.cast(self._callback, ctypes.c_void_p).value

    def _clear_lazy(self, buffer: int, value: int) -> None:
        base: int = self._base(buffer)
        start, end = self._pages(buffer)
        if value == 0 and self._madvise(start, end - start, _DONT_NEED) == 0:
            ctypes.memset(base, 0, start - base)
            ctypes.memset(end, 0, base + self._sizes[buffer] - end)
        else:
            ctypes.memset(base, value, self._sizes[buffer])

    def _pages(self, buffer: int) -> tuple[int, int]:
        """Addresses at which the whole pages of a buffer begin and end."""
        base: int = self._base(buffer)
        return -(-base // mmap.PAGESIZE) * mmap.PAGESIZE, (base + self._sizes[buffer]) // mmap.PAGESIZE * mmap.PAGESIZE

    def _proved_place(self) -> int:
        """The place that `ggml_backend_buffer_clear` calls: each candidate is replaced in a small buffer, and tried."""
        for place in _CLEAR_PLACES:
            calls: list[tuple[int, int]] = []
            replacement = _CLEAR(lambda buffer, value, calls=calls: calls.append((buffer, value)))
            buffer: int = self._allocate(self.buffer_type, 64)
            slot = self._slot(buffer, place)
            before, slot.value = slot.value, ctypes.cast(replacement, ctypes.c_void_p).value
            self._clear(buffer, 7)  # if it is another's place, this fills 64 bytes
            slot.value = before
            self._free(buffer)
            if calls == [(buffer, 7)]:
                return place
        raise LookupError("ggml's table of a buffer has another layout")

    def _slot(self, buffer: int, place: int) -> ctypes.c_void_p:
        return ctypes.c_void_p.from_address(buffer + place * _POINTER)


@functools.cache
def _buffer_tables() -> _BufferTables | None:
    """The functions, where they and the system are as expected."""
    if sys.platform != "linux":
        return None
    try:
        return _BufferTables(llama_cpp.llama_cpp._lib)
    except (AttributeError, LookupError):
        return None


def _function(function: Any, result: Any, *arguments: Any) -> Callable[..., Any]:
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]
