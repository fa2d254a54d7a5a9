"""Collecting an importance matrix: as llama-imatrix does, as computed by hand, and nothing left of a failure."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.errors import ImatrixFailed, ImatrixInvalid
from convert.quantize.imatrix import Imatrix, ImatrixEntry, collect, read_imatrix, write_imatrix
from convert.quantize.imatrix_child import cut
from models.errors import BadGguf
from models.gguf.fields import Field
from runtime.llama.model import load_tokenizer
from tests.support.convert.tiny import N_EMBD, TOKENS, weights, write_model

GOLDEN = Path(__file__).parent / "golden"
CHUNK = 64


def golden_model(folder: Path, name: str) -> Path:
    experts = 4 if name == "experts" else 0
    architecture = "llama" if experts else "gemma3"
    return write_model(folder / "toy.gguf", architecture, kind=gguf.GGMLQuantizationType.F16, experts=experts)


def golden_tokens(model: Path) -> list[int]:
    """The text as llama-imatrix takes it: whole chunks only."""
    text = (GOLDEN / "imatrix.txt").read_text(encoding="utf-8")
    tokens = load_tokenizer(model).encode(text, add_special=True, parse_special=False)
    return tokens[: len(tokens) // CHUNK * CHUNK]


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_it_equals_llama_imatrix_within_one_percent(tmp_path: Path, name: str) -> None:
    model, told = golden_model(tmp_path, name), list[tuple[int, int]]()
    tokens = golden_tokens(model)
    found = collect(
        model, [tokens], tmp_path / "found", lambda done, total: told.append((done, total)), chunk_tokens=CHUNK
    )
    golden = read_imatrix(GOLDEN / f"imatrix-{name}.gguf")
    assert (found.n_chunks, found.chunk_tokens) == (golden.n_chunks, golden.chunk_tokens) == (3, CHUNK)
    assert found.entries.keys() == golden.entries.keys()
    for tensor, entry in golden.entries.items():
        np.testing.assert_array_equal(found.entries[tensor].counts, entry.counts)
        np.testing.assert_allclose(found.entries[tensor].sums, entry.sums, rtol=0.01, err_msg=tensor)
    assert told == [(64, 192), (128, 192), (192, 192)]


def test_the_first_layers_are_the_normed_embeddings_squared(tmp_path: Path) -> None:
    """By hand: Gemma scales embeddings by the root of their width; the norm's weights are 1 here."""
    model = write_model(tmp_path / "toy.gguf")
    sequences = [[2, 10, 200, 77], [2, 263, 264, 265, 265, 266]]
    found = collect(model, sequences, tmp_path / "found", silent)
    embedded = weights()["token_embd.weight"][np.concatenate(sequences)] * np.sqrt(N_EMBD)
    normed = embedded / np.sqrt(np.mean(embedded**2, axis=1, keepdims=True) + 1e-6)
    for name in ("attn_q", "attn_k", "attn_v"):
        entry = found.entries[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(entry.sums[0], np.square(normed).sum(axis=0), rtol=1e-5)
        assert entry.counts == [10]


def test_the_output_matrix_only_when_asked(tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy.gguf")
    without = collect(model, [[2, 10, 11]], tmp_path / "without", silent)
    with_it = collect(model, [[2, 10, 11]] * 2, tmp_path / "with", silent, output=True)
    assert with_it.entries.keys() - without.entries.keys() == {"token_embd.weight"}
    assert with_it.entries["token_embd.weight"].counts == [6]
    for name, entry in without.entries.items():
        np.testing.assert_allclose(with_it.entries[name].sums, 2 * entry.sums, rtol=1e-6)


def test_long_sequences_go_on_behind_a_bos() -> None:
    assert list(cut([[1, 2, 3, 4, 5], [6], [], [7, 8]], 2, bos=9)) == [[1, 2], [9, 4], [9], [6], [7, 8]]
    assert list(cut([[1, 2, 3]], 2, bos=None)) == [[1, 2], [3]]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = {
        "b": ImatrixEntry(np.array([[1, 2, 3], [0, 0, 0]], np.float32), np.array([4, 0])),
        "a": ImatrixEntry(np.array([[0.5, 8]], np.float32), np.array([2])),
    }
    write_imatrix(tmp_path / "file", Imatrix(entries, 3, 64))
    found = read_imatrix(tmp_path / "file")
    assert (list(found.entries), found.n_chunks, found.chunk_tokens) == (["a", "b"], 3, 64)
    np.testing.assert_array_equal(found.entries["b"].sums, entries["b"].sums)
    # an expert nobody asked is as important as any
    np.testing.assert_array_equal(found.entries["b"].importance, np.array([0.25, 0.5, 0.75, 1, 1, 1], np.float32))
    np.testing.assert_array_equal(found.entries["a"].importance, np.array([0.25, 4], np.float32))


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([1, -1], [1], r"'a\.in_sum2' holds values that are negative or not finite"),
        ([1, np.nan], [1], r"'a\.in_sum2' holds values that are negative or not finite"),
        ([1, 2, 3], [1, 1], "'a' has 3 sums and 2 counts"),
        ([1, 2], None, r"'a\.counts' is missing"),
        (None, [1], r"holds no tensor ending in '\.in_sum2'"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, sums: list[float] | None, counts: list[float] | None, message: str
) -> None:
    path = tmp_path / "bad.gguf"
    writer = gguf.GGUFWriter(path, "x")
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 1)
    for name, values in (("a.in_sum2", sums), ("a.counts", counts)):
        if values is not None:
            writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ImatrixInvalid, match=message):
        read_imatrix(path)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    with pytest.raises(ImatrixInvalid, match=r"no importance matrix: .* has no integer field 'imatrix\.chunk_count'"):
        read_imatrix(write_model(tmp_path / "toy.gguf"))


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[2, 10], [2, len(TOKENS)]], f"text 1 has token ids 2 … {len(TOKENS)}, 'toy.gguf' has {len(TOKENS)} tokens"),
        ([[-1]], "text 0 has token ids -1 … -1"),
        ([[], []], "there is no text"),
    ],
)
def test_tokens_are_checked_before_llama_cpp_sees_them(
    tmp_path: Path, sequences: list[list[int]], message: str
) -> None:
    with pytest.raises(ImatrixFailed, match=message):
        collect(write_model(tmp_path / "toy.gguf"), sequences, tmp_path / "found", silent)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(BadGguf, match=r"'GGUF'"):
        collect(tmp_path / "bad.gguf", [[1]], tmp_path / "found", silent)


def test_what_llama_cpp_says_is_in_the_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy.gguf")
    data = model.read_bytes()
    model.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"))
    with pytest.raises(
        ImatrixFailed, match=r"'toy\.gguf' \(exit code 1\): .*tensor 'blk\.1\.ffn_up\.weight' not found"
    ):
        collect(model, [[2, 10]], tmp_path / "found", silent)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    broken = np.full((96, 64), np.nan, np.float32)
    model = write_model(tmp_path / "toy.gguf", changes={"blk.0.ffn_up.weight": broken})
    with pytest.raises(ImatrixFailed, match=r"the inputs of 'blk\.0\.ffn_down\.weight' are not finite"):
        collect(model, [[2, 10]], tmp_path / "found", silent)


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy.gguf")

    def interrupt(done: int, total: int) -> None:
        shutil.copy(model, tmp_path / "found.partial")  # as if it had been about to write
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, [[2, 10]] * 100, tmp_path / "found", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]


@pytest.mark.usefixtures("fresh_children")
def test_a_killed_child_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, children = write_model(tmp_path / "toy.gguf"), list[subprocess.Popen[str]]()

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    monkeypatch.setattr("convert.child.subprocess.Popen", Watched)
    # more progress than its pipe holds: it cannot be done before it is killed
    sequences = [[2]] * 20_000
    with pytest.raises(ImatrixFailed, match=r"'toy\.gguf' \(exit code -9\)"):
        collect(model, sequences, tmp_path / "found", lambda done, total: children[0].kill())
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]


def test_the_datasets_field_is_there_for_llama_quantize(tmp_path: Path) -> None:
    """It refuses a file without all three of its fields (common/imatrix-loader.cpp)."""
    write_imatrix(tmp_path / "file", Imatrix({"a": ImatrixEntry(np.ones((1, 2), np.float32), np.array([1]))}, 1, 512))
    fields = gguf.GGUFReader(tmp_path / "file").fields
    assert fields["general.type"].contents() == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= fields.keys()
    assert Field.string_array([]).length == 0
