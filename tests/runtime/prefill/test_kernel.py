"""The compiled products against numpy, for every quantized type and for sizes that fill no tile."""

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from runtime.llama.ggml import Ggml
from runtime.prefill.build import Host, Unavailable, library
from runtime.prefill.library import HALVES, HALVES_BLOCK_BYTES, PANEL_BLOCK_BYTES, Library, Panels, open_library

RNG = np.random.default_rng(7)
T = GGMLQuantizationType
# int8 with a scale per 32 says their numbers exactly.
EXACT = (T.Q8_0, T.Q4_0, T.Q5_0, T.IQ4_NL)
KINDS = [kind for kind, traits in quants._type_traits.items() if kind not in (T.F32, *HALVES)]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Library:
    try:
        path: Path = library(tmp_path_factory.mktemp("prefill"), Host.here(llama_cpp.__version__))
    except Unavailable as error:
        pytest.skip(str(error))
    ggml = llama_cpp.llama_cpp._lib
    known = Ggml(ggml)
    return open_library(path, ggml, (known.mul_mat, known.attention))


@pytest.fixture
def panels(compiled: Library) -> Iterator[Panels]:
    made = Panels(compiled)
    yield made
    made.close()


def random_weights(kind: GGMLQuantizationType, n_cols: int, n_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a matrix in `kind`, and its numbers as float32. What gguf cannot quantize is made of random bytes."""
    try:
        data = quants.quantize(RNG.standard_normal((n_cols, n_k)).astype(np.float32), kind)
    except NotImplementedError:
        block, n_bytes = GGML_QUANT_SIZES[kind]
        # Bytes below 0x3c: a half at any place is below 1, and every index lies in its table.
        data = RNG.integers(0, 0x3C, (n_cols, n_k // block * n_bytes)).astype(np.uint8)
    data = np.ascontiguousarray(data)
    return data, quants.dequantize(data, kind).astype(np.float32)


def distance(product: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> float:
    exact = rows.astype(np.float64) @ weights.T.astype(np.float64)
    return float(np.sqrt(np.mean((product - exact) ** 2)) / np.sqrt(np.mean(exact**2)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_is_multiplied_like_numpy_does(panels: Panels, kind: GGMLQuantizationType) -> None:
    data, weights = random_weights(kind, 40, 768)
    rows = RNG.standard_normal((37, 768)).astype(np.float32)
    assert panels.add("w", int(kind), 768, 40, data, 2)
    assert panels.n_bytes == 3 * 24 * PANEL_BLOCK_BYTES
    assert distance(panels.multiply("w", rows, 40, 2), rows, weights) < (2e-4 if kind in EXACT else 8e-3)


@pytest.mark.parametrize("kind", HALVES, ids=lambda kind: kind.name)
def test_weights_of_16_bits_are_multiplied_finer_than_16_bits_are(panels: Panels, kind: GGMLQuantizationType) -> None:
    data, weights = random_weights(kind, 40, 768)
    rows = RNG.standard_normal((37, 768)).astype(np.float32)
    assert panels.add("w", int(kind), 768, 40, data, 2)
    assert panels.n_bytes == 3 * 24 * HALVES_BLOCK_BYTES
    assert distance(panels.multiply("w", rows, 40, 2), rows, weights) < 1e-4


@pytest.mark.parametrize("kind", [T.Q8_0, T.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_rows", [*range(1, 14), 31, 32, 33, 69, 70])
@pytest.mark.parametrize(("n_cols", "n_k"), [(16, 32), (1, 64), (23, 544), (48, 1056)])
def test_odd_sizes(panels: Panels, n_rows: int, n_cols: int, n_k: int, kind: GGMLQuantizationType) -> None:
    data, weights = random_weights(kind, n_cols, n_k)
    rows = RNG.standard_normal((n_rows, n_k)).astype(np.float32)
    assert panels.add("w", int(kind), n_k, n_cols, data, 2)
    product = panels.multiply("w", rows, n_cols, 2)
    assert distance(product, rows, weights) < 2e-4


@pytest.mark.parametrize("kind", [T.Q4_0, T.F16], ids=lambda kind: kind.name)
def test_a_row_is_the_same_beside_any_others(panels: Panels, kind: GGMLQuantizationType) -> None:
    data, _ = random_weights(kind, 24, 1024)
    rows = RNG.standard_normal((50, 1024)).astype(np.float32)
    panels.add("w", int(kind), 1024, 24, data, 2)
    whole = panels.multiply("w", rows, 24, 2)
    assert np.array_equal(panels.multiply("w", rows[13:27], 24, 1), whole[13:27])


def test_zeros_outliers_and_numbers_that_are_none(panels: Panels) -> None:
    data, weights = random_weights(T.Q8_0, 16, 64)
    panels.add("w", int(T.Q8_0), 64, 16, data, 1)
    rows = RNG.standard_normal((8, 64)).astype(np.float32)
    rows[0], rows[1, 5], rows[2, 63], rows[3, 0] = 0, np.inf, np.nan, 1e30
    product = panels.multiply("w", rows, 16)
    assert not product[0].any()
    assert np.isnan(product[1]).all()
    assert np.isnan(product[2]).all()
    assert distance(product[3:4], rows[3:4], weights) < 1e-3
    assert distance(product[4:], rows[4:], weights) < 2e-4


def test_what_cannot_be_multiplied_is_said(panels: Panels) -> None:
    data = np.zeros(4096, np.uint8)
    assert not panels.add("w", int(T.Q8_0), 40, 16, data, 1)
    assert not panels.add("w", int(T.Q4_K), 32, 16, data, 1)
    with pytest.raises(Unavailable, match="'w'"):
        panels.multiply("w", np.zeros((1, 40), np.float32), 16)
