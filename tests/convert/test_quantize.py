"""Quantizing through llama.cpp: real files of each kind, its errors as ours, nothing left behind."""

from pathlib import Path

import gguf
import pytest

from convert.candidates import plain
from convert.errors import QuantizationUnknown, QuantizeFailed
from convert.quantize import QUANTIZATIONS, check_quantization, disk_need, quantize
from tests.convert.tiny import write_model


@pytest.fixture
def half(tmp_path: Path) -> Path:
    return write_model(tmp_path / "half.gguf", kind=gguf.GGMLQuantizationType.F16)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_it_writes_the_quantization_asked_for(tmp_path: Path, half: Path, name: str) -> None:
    target, steps = tmp_path / "out.gguf", []
    quantize(half, target, plain(name), None, lambda done, total: steps.append((done, total)))
    reader = gguf.GGUFReader(target)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    if name != "Q4_K_M":  # rows of 64 do not fit a K-quant's block: llama.cpp falls back, tensor by tensor
        assert kinds["blk.0.ffn_up.weight"] == name
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert reader.fields["general.file_type"].contents() == QUANTIZATIONS[name]
    assert steps[-1] == (len(kinds), len(kinds))
    matrix_bytes = sum(t.n_bytes for t in gguf.GGUFReader(half).tensors if t.tensor_type.name == "F16")
    need = disk_need(half.stat().st_size, matrix_bytes, name)
    metadata_bytes = 1024  # llama.cpp adds a field or two
    assert half.stat().st_size + target.stat().st_size <= need + metadata_bytes
    assert need < 2 * half.stat().st_size


def test_what_llama_cpp_says_is_in_the_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    with pytest.raises(QuantizeFailed, match=r"'bad\.gguf' could not be quantized to Q8_0 .*failed to load model"):
        quantize(bad, tmp_path / "out.gguf", plain("Q8_0"), None, lambda done, total: None)
    assert not (tmp_path / "out.gguf").exists()


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path, half: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(half, tmp_path / "out.gguf", plain("Q8_0"), None, interrupt)
    assert not (tmp_path / "out.gguf").exists()


def test_names_are_checked_whatever_their_case() -> None:
    assert check_quantization("q4_k_m") == "Q4_K_M"
    with pytest.raises(QuantizationUnknown, match="'Q3_X'; known are F16, Q8_0"):
        check_quantization("Q3_X")
