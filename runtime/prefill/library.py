"""The compiled backend, bound with ctypes: registered with ggml once, then asked for panels of a model's weights.

llama.cpp may hold its weights repacked, in layouts of its own. Decode rows keep those; panels come from the file's own
bytes.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from models.errors import BadGguf
from models.gguf.header import TensorInfo, read_tensors

from .build import Unavailable

OFF = 1 << 30
"""As the least number of rows: no product is taken over."""

# ggml's functions, in the order of `Functions` in ggml_abi.h.
_FUNCTIONS = (
    *("ggml_backend_register", "ggml_backend_cpu_buffer_type", "ggml_backend_cpu_buffer_from_ptr"),
    *("ggml_backend_buft_name", "ggml_backend_buft_is_host"),
    *("ggml_graph_n_nodes", "ggml_graph_node", "ggml_get_type_traits"),
)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "register": (None, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)),
    "new": (ctypes.c_void_p, ()),
    "add": (
        ctypes.c_int64,
        (
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64),
            *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int),
        ),
    ),
    "bind": (None, (ctypes.c_void_p,)),
    "min_rows": (None, (ctypes.c_void_p, ctypes.c_int)),
    "products": (ctypes.c_int64, (ctypes.c_void_p,)),
    "attend": (None, (ctypes.c_void_p, ctypes.c_int)),
    "attended": (ctypes.c_int64, (ctypes.c_void_p,)),
    "compute_attention": (None, (ctypes.c_void_p, ctypes.c_int)),
    "free": (None, (ctypes.c_void_p,)),
    "multiply": (
        ctypes.c_int,
        (
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
            *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int),
        ),
    ),
}
_registered: dict[str, "Library"] = {}  # by the file's name, a hash of what it was made of


class Library:
    """The backend's functions. Make it with `open_library`: ggml keeps a registered backend for the process's life."""

    register: Any
    new: Any
    add: Any
    bind: Any
    min_rows: Any
    products: Any
    attend: Any
    attended: Any
    compute_attention: Any
    free: Any
    multiply: Any

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, f"deskside_prefill_{name}")
            function.restype, function.argtypes = result, list(arguments)
            setattr(self, name, function)


def open_library(path: Path, ggml: ctypes.CDLL, operations: tuple[int, int]) -> Library:
    """Load the library and register its device with `ggml`, once.

    `operations` are the numbers of the matrix product and of attention.

    Raises Unavailable if it cannot be loaded, or if ggml lacks a function.
    """
    if path.name not in _registered:
        if _registered:
            raise Unavailable("another build of them is loaded in this process")
        try:
            library = Library(path)
            addresses = [ctypes.cast(getattr(ggml, name), ctypes.c_void_p).value for name in _FUNCTIONS]
        except (OSError, AttributeError) as error:
            raise Unavailable(f"the compiled library cannot be loaded: {error}") from error
        library.register((ctypes.c_void_p * len(addresses))(*addresses), *operations)
        _registered[path.name] = library
    return _registered[path.name]


class Panels:
    """The weights of one model in the backend's own layout. Close it before the model's weights are freed."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._model: int | None = library.new()
        self.n_bytes = 0
        self.n_weights = 0

    def add(self, name: str, kind: int, n_k: int, n_cols: int, data: np.ndarray, n_threads: int) -> bool:
        """Make panels of the matrix `name`, `n_cols` rows of `n_k` numbers of ggml type `kind`; `data` is its bytes.

        False if it cannot be multiplied here. Raises Unavailable without memory.
        """
        made = self._library.add(self._model, name.encode(), kind, n_k, n_cols, data.ctypes.data, n_threads)
        if made == -2:
            raise Unavailable("there is no memory for them")
        if made < 0:
            return False
        self.n_bytes += made
        self.n_weights += 1
        return True

    @contextmanager
    def binding(self) -> Iterator[None]:
        """Bind the weights of the contexts that this thread makes within the block."""
        self._library.bind(self._model)
        try:
            yield
        finally:
            self._library.bind(None)

    def take_over(self, min_rows: int) -> None:
        """Compute products of at least `min_rows` rows in graphs built from now on; OFF: none."""
        self._library.min_rows(self._model, min_rows)

    def attend(self, *, on: bool) -> None:
        """Compute attention too, or not, in contexts that are made in `binding`, where model and cache allow it."""
        self._library.attend(self._model, on)

    @property
    def n_attended(self) -> int:
        """Attention operations computed so far."""
        return int(self._library.attended(self._model))

    @property
    def n_products(self) -> int:
        """Products computed so far."""
        return int(self._library.products(self._model))

    def multiply(self, name: str, rows: np.ndarray, n_cols: int, n_threads: int = 1) -> np.ndarray:
        """`rows`, float32 of shape (m, n_k), times the matrix `name`: float32 of shape (m, n_cols)."""
        rows = np.ascontiguousarray(rows, np.float32)
        product = np.full((len(rows), n_cols), np.nan, np.float32)
        code = self._library.multiply(
            self._model, name.encode(), rows.ctypes.data, len(rows), product.ctypes.data, n_threads
        )
        if code != 0:
            raise Unavailable(f"there are no panels of {name!r}")
        return product

    def close(self) -> None:
        """Free the panels. Closing twice is harmless."""
        model, self._model = self._model, None
        if model is not None:
            self._library.free(model)


BLOCK, COLUMNS = 32, 16
PANEL_BLOCK_BYTES = 544
"""Bytes of 32 × 16 quantized weights: int8, and a float16 scale per 32."""
HALVES_BLOCK_BYTES = 1088
"""The same of weights of 16 bits: int16, and a float32 scale per 32."""
HALVES = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
"""Types of 16 bits. float32 stays llama.cpp's: int16 would be coarser."""


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
    total = 0
    for tensor in tensors:
        n_cols, n_k = tensor.shape
        block = HALVES_BLOCK_BYTES if tensor.kind in HALVES else PANEL_BLOCK_BYTES
        total += -(-n_cols // COLUMNS) * (n_k // BLOCK) * block
    return total


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
        raise Unavailable("the model's weights are float32")


def _multiplies(tensor: TensorInfo) -> bool:
    named = tensor.name.startswith("blk.") and tensor.name.endswith(".weight")
    shaped = len(tensor.shape) == 2 and min(tensor.shape) > 1 and tensor.shape[-1] % BLOCK == 0
    return named and shaped and tensor.kind != GGMLQuantizationType.F32
