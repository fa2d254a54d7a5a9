"""The door to llama.cpp without a model: every return code has its error, every unusable file its reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.errors import BatchInvalid, DecodeAborted, DecodeFailed, LoadFailed, NoKvSlot
from runtime.llama.decode import decode_error
from runtime.llama.handle import backend_name, system_info
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load, load_tokenizer


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, NoKvSlot), (2, DecodeAborted), (-1, BatchInvalid), (-2, DecodeFailed), (-3, DecodeFailed), (99, DecodeFailed)],
)
def test_every_return_code_has_its_error(code: int, kind: type[Exception]) -> None:
    error = decode_error(code, 12)
    assert type(error) is kind
    assert str(code) in str(error)
    assert "12 tokens" in str(error)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 a zip", "not a GGUF file"),
        (b"GGUF" + bytes(range(1, 200)), "cannot be loaded"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "cannot be loaded"),
    ],
    ids=["missing", "empty", "zip", "version", "counts"],
)
def test_a_file_that_is_no_model_says_why(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "some.gguf"
    if content is not None:
        path.write_bytes(content)
    for door in (load, load_tokenizer):
        with pytest.raises(LoadFailed, match=rf"some\.gguf.*{reason}"):
            door(path)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="directory"):
        load(tmp_path)


def test_options_are_checked_before_the_file(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"1 … 256, got 257"):
        load(tmp_path / "none.gguf", LoadOptions(n_seq_max=257))


@pytest.mark.parametrize(
    ("line", "offloads", "name"),
    [
        ("CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | LLAMAFILE = 1 | ", False, "CPU (AVX2, FMA)"),
        ("CUDA : ARCHS = 890 | CPU : AVX2 = 1 | ", True, "CUDA + CPU (AVX2)"),
        ("CUDA : ARCHS = 890 | CPU : AVX2 = 1 | ", False, "CPU (AVX2)"),
        ("Metal : EMBED_LIBRARY = 1 | CPU : NEON = 1 | DOTPROD = 1 | ", True, "Metal + CPU (NEON, DOTPROD)"),
        ("CPU : AVX2 = 0 | ", False, "CPU"),
    ],
)
def test_the_backend_has_a_short_name(line: str, offloads: bool, name: str) -> None:
    assert backend_name(line, offloads=offloads) == name


@pytest.mark.parametrize(
    ("line", "library", "repacks", "backend"),
    [
        (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", SimpleNamespace(), False, "CPU (AVX2, AMX unused)"),
        (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", SimpleNamespace(deskside_amx_mended=1), True, "CPU (AVX2, AMX_INT8)"),
        (b"CPU : AVX2 = 1 | ", SimpleNamespace(), True, "CPU (AVX2)"),
    ],
)
def test_weights_are_repacked_for_amx_tiles_only_where_the_mend_was_compiled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, library: object, repacks: bool, backend: str
) -> None:
    seen: list[bool] = []

    def refuse(path: bytes, params: Any) -> None:
        seen.append(params.use_extra_bufts)

    monkeypatch.setattr("runtime.llama.handle.llama_cpp.llama_print_system_info", lambda: line)
    monkeypatch.setattr("runtime.llama.handle.llama_cpp._lib", library)
    monkeypatch.setattr("runtime.llama.handle.llama_cpp.llama_model_load_from_file", refuse)
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(LoadFailed):
        load(path)
    assert seen == [repacks]
    assert backend_name(system_info(), offloads=False) == backend
