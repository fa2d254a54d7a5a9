"""The door to ggml: float16 as numpy makes it, and a library that is not the expected ggml is refused."""

import ctypes

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from runtime.errors import EngineError
from runtime.llama.ggml import Ggml, to_half

# Where rounding changes its ways: around float16's smallest number, its smallest normal one and its largest.
EDGES = [0x32FF_F000, 0x337F_F000, 0x387F_E000, 0x477F_D000]


def reference(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def test_it_rounds_as_numpy_does() -> None:
    spread = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    around = [np.arange(edge, edge + 0x4000, dtype=np.uint32) for edge in EDGES]
    bits = np.concatenate([spread, *around, *(edge | np.uint32(1 << 31) for edge in around)])
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    np.testing.assert_array_equal(to_half(values).view(np.uint16), reference(values).view(np.uint16))


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=9), elements=st.floats(width=32)))
def test_shapes_and_views_are_kept(values: np.ndarray) -> None:
    for view in (values, values[::2], values.T):
        np.testing.assert_array_equal(to_half(view), reference(view))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_ggmls_loop_numpys_is_used(monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    monkeypatch.setattr(llama_cpp.llama_cpp, "_lib", object())
    values: np.ndarray = np.array([1 / 3, 70_000, -1e-8], dtype)
    np.testing.assert_array_equal(to_half(values), reference(values))


def test_the_installed_ggml_has_the_expected_layout() -> None:
    ggml = Ggml(llama_cpp.llama_cpp._lib)
    assert len({ggml.mul_mat, ggml.mul_mat_id, ggml.attention}) == 3


def test_a_library_without_ggmls_functions_is_refused() -> None:
    with pytest.raises(EngineError, match=r"lacks a function that collecting needs: .*ggml_init"):
        Ggml(ctypes.CDLL(None))
