"""The compiled attention against numpy, and its rows against themselves, alone and beside others."""

import ctypes

import numpy as np
import pytest

from runtime.llama.ggml import GgmlTensor
from runtime.prefill.library import Library

from .test_kernel import compiled

__all__ = ["compiled"]

F32, F16 = 0, 1
RNG = np.random.default_rng(11)


def tensor(data: np.ndarray, kind: int) -> GgmlTensor:
    """ggml's view of an array: the last axis first, in the array's own strides."""
    made = GgmlTensor()
    made.type, made.data = kind, data.ctypes.data
    made.ne[:], made.nb[:] = data.shape[::-1], data.strides[::-1]
    return made


class Case:
    """Random queries, keys, values and mask, as `[stream, head, token, number]`; K and V lie as in a KV cache."""

    def __init__(self, n_streams: int, n_heads: int, n_shared: int, n_queries: int, n_cells: int, n_k: int) -> None:
        n_kv_heads = n_heads // n_shared
        cache = RNG.standard_normal((2, n_streams, n_cells, n_kv_heads, n_k)).astype(np.float16)
        self.k, self.v = (part.transpose(0, 2, 1, 3) for part in cache)
        self.q = RNG.standard_normal((n_streams, n_queries, n_heads, n_k), np.float32).transpose(0, 2, 1, 3)
        self.mask: np.ndarray = np.zeros((n_streams, 1, n_queries, n_cells), np.float16)
        self.mask[RNG.random(self.mask.shape) < 0.3] = -np.inf
        self.n_shared = n_shared

    def computed(self, library: Library, *, cap: float = 0.0, n_threads: int = 2) -> np.ndarray:
        """Our own, shape (streams, queries, heads, numbers)."""
        n_streams, n_heads, n_queries, n_k = self.q.shape
        result = np.full((n_streams, n_queries, n_heads, n_k), np.nan, np.float32)
        operation = tensor(result, F32)
        inputs = [tensor(self.q, F32), tensor(self.k, F16), tensor(self.v, F16), tensor(self.mask, F16)]
        for place, source in enumerate(inputs):
            operation.src[place] = ctypes.pointer(source)
        operation.op_params[:3] = np.array([n_k**-0.5, 0, cap], np.float32).view(np.int32).tolist()
        library.compute_attention(ctypes.addressof(operation), n_threads)
        return result

    def expected(self, *, cap: float = 0.0) -> np.ndarray:
        k, v = (np.repeat(part.astype(np.float64), self.n_shared, axis=1) for part in (self.k, self.v))
        scores = self.q.astype(np.float64) @ k.swapaxes(2, 3) * self.q.shape[-1] ** -0.5
        if cap:
            scores = cap * np.tanh(scores / cap)
        scores += self.mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        values: np.ndarray = weights / weights.sum(axis=-1, keepdims=True) @ v
        return values.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize(
    ("n_streams", "n_heads", "n_shared", "n_queries", "n_cells", "n_k"),
    [
        (1, 4, 4, 1, 300, 256),
        (3, 9, 3, 1, 64, 64),
        (1, 8, 1, 37, 130, 80),
        (2, 6, 2, 11, 257, 96),
        (1, 32, 32, 3, 5, 16),
    ],
)
def test_it_is_what_numpy_computes(
    compiled: Library, cap: float, n_streams: int, n_heads: int, n_shared: int, n_queries: int, n_cells: int, n_k: int
) -> None:
    case = Case(n_streams, n_heads, n_shared, n_queries, n_cells, n_k)
    case.mask[..., 0] = 0
    assert np.abs(case.computed(compiled, cap=cap) - case.expected(cap=cap)).max() < 2e-5


def test_a_query_has_the_same_bits_alone_and_beside_others_with_any_threads(compiled: Library) -> None:
    case = Case(3, 8, 4, 20, 200, 64)
    case.mask[..., 0] = 0
    together = case.computed(compiled)
    assert np.array_equal(case.computed(compiled, n_threads=1), together)
    for stream in range(3):
        for query in (0, 7, 19):
            alone = Case(1, 8, 4, 1, 200, 64)
            alone.q = case.q[stream : stream + 1, :, query : query + 1]
            alone.mask = case.mask[stream : stream + 1, :, query : query + 1]
            alone.k, alone.v = case.k[stream : stream + 1], case.v[stream : stream + 1]
            assert np.array_equal(alone.computed(compiled)[0, 0], together[stream, query])


def test_masked_cells_and_cells_beyond_change_no_bit(compiled: Library) -> None:
    """More cells are looked through, of which none counts; 64 in front move all others by a block."""
    case, longer = Case(1, 4, 4, 3, 100, 64), Case(1, 4, 4, 3, 320, 64)
    case.mask[..., 0] = 0
    longer.mask[:] = -np.inf
    longer.q = case.q
    longer.k[:, :, 64:164], longer.v[:, :, 64:164], longer.mask[..., 64:164] = case.k, case.v, case.mask
    assert np.array_equal(longer.computed(compiled), case.computed(compiled))


def test_a_query_that_sees_nothing_is_nothing(compiled: Library) -> None:
    case = Case(1, 4, 4, 2, 70, 64)
    case.mask[:, :, 1] = -np.inf
    assert not case.computed(compiled)[0, 1].any()
