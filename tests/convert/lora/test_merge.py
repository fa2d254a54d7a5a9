"""The half-precision file equals an independent numpy merge, its golden hashes, and a second conversion."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from convert.checkpoint import source as checkpoint_module
from convert.checkpoint.source import GgufCheckpoint
from convert.errors import SourceInvalid, VerifyFailed
from convert.gguf_writer import Layout, OutTensor, check_written, write_gguf
from convert.lora.adapter import read_adapter
from convert.lora.fit import Fitted, MergedCheckpoint, fit
from convert.planning.plan import file_rows, half_precision_kind
from models.gguf.fields import Field
from tests.support.convert.tiny import (
    MODULES,
    N_HEADS,
    N_KV_HEADS,
    adapter_tensors,
    hash_tensors,
    weights,
    write_adapter,
    write_model,
)

F16, F32, Q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0

# sha256 over "name sha256-of-its-bytes" of every tensor in the file's order, for the tiny model with its adapter merged
GOLDEN = {
    "gemma3": "40755038eaa02fd802b3884c8b5b08508ca2134f03142a8efb68a7c12cf4bd54",
    "llama": "6e803c2927b789b8f1102f70aca80f1c9f287d23cecfc41c7a36d2bd6e1fa35e",
}


def write(source: Path, target: Path, fitted: Fitted | None = None) -> dict[str, str]:
    with closing(GgufCheckpoint(source)) as opened:
        merged = MergedCheckpoint(opened, fitted or Fitted())
        infos = merged.header.tensors
        tensors = [OutTensor(info.name, info.shape, half_precision_kind(info)) for info in infos.values()]
        layout = Layout(opened.header.fields, tensors, opened.header.alignment)

        def rows(name: str) -> Iterator[np.ndarray]:
            return file_rows(merged, infos[name])

        check_written(target, write_gguf(target, layout, rows, lambda n_bytes: None))
        assert target.stat().st_size == layout.file_bytes
    return hash_tensors(target)


def merge(tmp_path: Path, architecture: str) -> tuple[Path, dict[str, str]]:
    source = write_model(tmp_path / f"{architecture}.gguf", architecture)
    with closing(GgufCheckpoint(source)) as opened:
        fitted = fit(read_adapter(write_adapter(tmp_path / "adapter")), opened.header)
    target = tmp_path / f"{architecture}-f16.gguf"
    return target, write(source, target, fitted)


def expected(architecture: str) -> dict[str, np.ndarray]:
    """The merge as Hugging Face's layout has it: undo the reordering, add, reorder again, row by row."""
    merged = weights(architecture)
    adapter = adapter_tensors()
    for layer in range(2):
        for part, module in MODULES.items():
            name, stem = f"blk.{layer}.{part}.weight", f"base_model.model.model.layers.{layer}.{module}"
            change = 2 * np.einsum("or,ri->oi", adapter[f"{stem}.lora_B.weight"], adapter[f"{stem}.lora_A.weight"])
            if architecture == "llama" and part in {"attn_q", "attn_k"}:
                heads = N_HEADS if part == "attn_q" else N_KV_HEADS
                head = len(change) // heads
                order = [
                    h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)
                ]
                change = change[order]
            merged[name] = merged[name] + change
    return merged


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_the_merge_equals_an_independent_one(tmp_path: Path, architecture: str) -> None:
    target, _ = merge(tmp_path, architecture)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    wanted = expected(architecture)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        kind = F32 if array.ndim == 1 else F16
        assert found[name].tensor_type == kind
        np.testing.assert_array_equal(found[name].data, array.astype(np.float16 if kind == F16 else np.float32), name)


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_every_tensor_has_its_golden_bytes(tmp_path: Path, architecture: str) -> None:
    _, hashes = merge(tmp_path, architecture)
    digest = hashlib.sha256("\n".join(f"{name} {value}" for name, value in hashes.items()).encode()).hexdigest()
    assert digest == GOLDEN[architecture]


def test_the_same_inputs_give_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, _ = merge(tmp_path / "a", "gemma3")
    second, _ = merge(tmp_path / "b", "gemma3")
    assert first.read_bytes() == second.read_bytes()


def test_slabs_of_any_size_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = merge(tmp_path / "a", "llama")
    monkeypatch.setattr(checkpoint_module, "SLAB_ELEMENTS", 7 * 64)
    slabs, _ = merge(tmp_path / "b", "llama")
    assert whole.read_bytes() == slabs.read_bytes()


@pytest.mark.parametrize(("kind", "dtype"), [(None, np.float16), (F16, np.float16), (F32, np.float32)])
def test_rows_come_in_the_requested_type(tmp_path: Path, kind: gguf.GGMLQuantizationType | None, dtype: type) -> None:
    with closing(GgufCheckpoint(write_model(tmp_path / "a.gguf"))) as opened:
        (rows,) = file_rows(opened, opened.header.tensors["blk.0.ffn_up.weight"], kind)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, weights()["blk.0.ffn_up.weight"])


def test_a_quantized_source_is_dequantized(tmp_path: Path) -> None:
    source = write_model(tmp_path / "q8.gguf", kind=Q8_0)
    hashes = write(source, tmp_path / "f16.gguf")
    array = weights()["blk.1.ffn_down.weight"]
    widened = dequantize(quantize(array, Q8_0), Q8_0).astype(np.float16)
    assert hashes["blk.1.ffn_down.weight"] == hashlib.sha256(widened.tobytes()).hexdigest()


def test_metadata_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a.gguf", template="{{ messages }}")
    write(source, tmp_path / "b.gguf")
    theirs = [gguf.GGUFReader(path).fields for path in (source, tmp_path / "b.gguf")]
    assert {key: field.contents() for key, field in theirs[0].items()} == {
        key: field.contents() for key, field in theirs[1].items()
    }


@pytest.mark.parametrize(("value", "shown"), [(70_000.0, "float16: its largest magnitude is 70000"), (np.nan, "nan")])
def test_a_value_that_half_precision_cannot_hold_is_refused(tmp_path: Path, value: float, shown: str) -> None:
    array = weights()["blk.0.ffn_up.weight"].copy()
    array[3, 4] = value
    source = write_model(tmp_path / "a.gguf", changes={"blk.0.ffn_up.weight": array})
    with pytest.raises(SourceInvalid, match=r"'blk\.0\.ffn_up\.weight'") as caught:
        write(source, tmp_path / "b.gguf")
    assert shown in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_a_type_that_cannot_be_dequantized_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.gguf"
    layout = Layout({}, [OutTensor("x", (1, 256), gguf.GGMLQuantizationType.Q8_K)], 32)
    write_gguf(source, layout, lambda name: iter([np.zeros(292, np.uint8)]), lambda n_bytes: None)
    with pytest.raises(SourceInvalid, match="tensor 'x' is Q8_K, which cannot be dequantized"):
        write(source, tmp_path / "b.gguf")


def pieces(*arrays: np.ndarray) -> Callable[[str], Iterator[np.ndarray]]:
    return lambda name: iter(arrays)


def test_rows_that_do_not_fill_the_shape_are_refused(tmp_path: Path) -> None:
    layout = Layout({"general.name": Field.string("x")}, [OutTensor("x", (2, 4), F32)], 32)
    with pytest.raises(VerifyFailed, match=r"tensor 'x' has 16 bytes, its shape \(2, 4\) needs 32"):
        write_gguf(tmp_path / "x.gguf", layout, pieces(np.zeros(4, np.float32)), lambda n_bytes: None)
    assert not list(tmp_path.iterdir())


def test_a_file_that_changed_on_disk_is_refused(tmp_path: Path) -> None:
    target, layout = tmp_path / "x.gguf", Layout({}, [OutTensor("x", (2, 4), F32)], 32)
    sha256 = write_gguf(target, layout, pieces(np.zeros(8, np.float32)), lambda n_bytes: None)
    check_written(target, sha256)
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    with pytest.raises(VerifyFailed, match=f"'x.gguf' was written with sha256 {sha256}, the disk has"):
        check_written(target, sha256)
