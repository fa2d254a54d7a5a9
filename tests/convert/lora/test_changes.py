"""Changes a slab at a time: any shape in slabs of any size equals the dense formula, written here in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convert.checkpoint.safetensors import SafetensorsFile
from convert.lora import changes as lora_changes
from convert.lora.changes import AddBias, Change, Lora, Replace, ReplaceRows, SavedTensor
from tests.support.convert.tiny import safetensors_bytes


def matrices(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    """Multiples of 1/64 between -2 and 2, drawn as integers: floats take several times as long."""
    steps = arrays(np.int16, shape, elements=st.integers(-128, 128))
    return steps.map(lambda drawn: drawn.astype(np.float32) / np.float32(64))


def apply(change: Change, base: np.ndarray, step: int) -> np.ndarray:
    slabs = [(start, base[start : start + step]) for start in range(0, len(base), step)]
    before = base.copy()
    changed = np.concatenate([change.apply(start, rows) for start, rows in slabs])
    np.testing.assert_array_equal(base, before, "a change must leave the rows it was given as they are")
    assert changed.dtype == np.float32
    return changed


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Base (n_out, n_in), A, B and a slab's rows."""
    n_out, n_in, rank = draw(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4)))
    shapes = [(n_out, n_in), (rank, n_in), (n_out, rank)]
    base, a, b = (draw(matrices(shape)) for shape in shapes)
    return base, a, b, draw(st.integers(1, n_out + 1))


@given(case=cases(), scale=st.sampled_from([0.5, 2.0, -1.0, 16 / 3]))
def test_a_lora_is_w_plus_scale_b_a(case: tuple[np.ndarray, np.ndarray, np.ndarray, int], scale: float) -> None:
    base, a, b, step = case
    wanted = base + scale * (b.astype(np.float64) @ a)
    np.testing.assert_allclose(apply(Lora("m", a, b, scale), base, step), wanted, rtol=1e-5, atol=1e-5)


@given(case=cases(), data=st.data())
def test_a_dora_brings_each_row_to_its_magnitude(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int], data: st.DataObject
) -> None:
    base, a, b, step = case
    magnitude = data.draw(arrays(np.int16, (len(base),), elements=st.integers(8, 256))).astype(np.float32) / 64
    plain = base + 0.5 * (b.astype(np.float64) @ a)
    length = np.sqrt((plain**2).sum(axis=1))
    found = apply(Lora("m", a, b, 0.5, magnitude), base, step)
    long = length > 0.1
    wanted = plain[long] * (magnitude / np.where(length, length, 1))[long, None]
    np.testing.assert_allclose(found[long], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found[long], axis=1), magnitude[long], rtol=1e-4)


def test_an_untrained_dora_changes_nothing() -> None:
    base = np.array([[3, 4], [5, 12]], np.float32)
    lora = Lora("m", np.ones((1, 2), np.float32), np.zeros((2, 1), np.float32), 2.0, np.array([5, 13], np.float32))
    np.testing.assert_array_equal(lora.apply(0, base), base)


def test_a_row_without_length_is_not_finite_and_so_never_written() -> None:
    lora = Lora("m", np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32), 1.0, np.ones(1, np.float32))
    assert np.isnan(lora.apply(0, np.zeros((1, 2), np.float32))).all()


@given(step=st.integers(1, 8), ids=st.sets(st.integers(0, 6), min_size=1))
def test_rows_are_replaced_wherever_the_slabs_begin(step: int, ids: set[int]) -> None:
    base = np.arange(14, dtype=np.float32).reshape(7, 2)
    order = np.array(sorted(ids))
    values = -np.arange(2 * len(order), dtype=np.float32).reshape(-1, 2) - 1
    wanted = base.copy()
    wanted[order] = values
    np.testing.assert_array_equal(apply(ReplaceRows(order, values), base, step), wanted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SavedTensor]:
    path = tmp_path_factory.mktemp("saved") / "adapter_model.safetensors"
    matrix = np.arange(24, dtype=np.float32).reshape(8, 3)
    tensors: dict[str, np.ndarray] = {
        "matrix": matrix,
        "same": matrix,
        "other": matrix + 1,
        "longer": np.zeros((9, 3)),
        "vector": np.arange(8),
    }
    path.write_bytes(safetensors_bytes(tensors, "F16"))
    file = SafetensorsFile(path)
    return {name: SavedTensor(file, tensor) for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("step", [1, 3, 8])
@pytest.mark.parametrize("order", [None, [1, 0, 3, 2, 7, 6, 5, 4]])
def test_a_whole_tensor_takes_the_place_of_the_bases(
    saved: dict[str, SavedTensor], step: int, order: list[int] | None
) -> None:
    wanted = saved["matrix"].array[slice(None) if order is None else order]
    change = Replace(saved["matrix"], None if order is None else np.array(order), 1.0)
    np.testing.assert_array_equal(apply(change, np.full((8, 3), 9, np.float32), step), wanted + 1)


def test_a_vector_is_one_row(saved: dict[str, SavedTensor]) -> None:
    base, order = np.full((1, 8), 9, np.float32), np.array([1, 0, 3, 2, 7, 6, 5, 4])
    assert apply(Replace(saved["vector"]), base, 1).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert apply(Replace(saved["vector"], order), base, 1).tolist() == [[1, 0, 3, 2, 7, 6, 5, 4]]
    assert apply(AddBias(np.arange(8, dtype=np.float32)), base, 1).tolist() == [[9, 10, 11, 12, 13, 14, 15, 16]]


def test_equal_tensors_are_found_slab_by_slab(saved: dict[str, SavedTensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for elements in (1, 6, 1000):
        monkeypatch.setattr(lora_changes, "SLAB_ELEMENTS", elements)
        assert saved["matrix"].equals(saved["same"])
        assert not saved["matrix"].equals(saved["other"])
        assert not saved["matrix"].equals(saved["longer"])
