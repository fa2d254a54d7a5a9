"""A trimmed checkpoint keeps rows bit for bit, and llama.cpp computes the same logits from them."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from convert.checkpoint.source import Checkpoint, GgufCheckpoint
from convert.errors import TrimImpossible
from convert.gguf_writer import Layout, OutTensor, write_gguf
from convert.trim.fields import KEPT_FIELD
from convert.trim.plan import TrimmedCheckpoint, TrimPlan, plan_trim
from models.gguf.header import Header, TensorInfo, read_header
from runtime.llama.decode import last_logits
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load
from tests.support.convert import tiny

F32 = GGMLQuantizationType.F32


class Fake:
    """Tensors in memory, given three rows at a time."""

    def __init__(self, header: Header, arrays: dict[str, np.ndarray]) -> None:
        infos = {name: TensorInfo(name, a.shape, F32, 0, a.nbytes) for name, a in arrays.items()}
        self.header = replace(header, tensors=infos)
        self.arrays = arrays
        self.closed = False

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        assert tensor is self.header.tensors[tensor.name], "only the source's own infos have offsets that it can use"
        rows = self.arrays[tensor.name].reshape(-1, tensor.shape[-1])
        yield from ((start, rows[start : start + 3]) for start in range(0, len(rows), 3))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "toy.gguf")


@pytest.fixture
def plan(toy: Path) -> TrimPlan:
    return plan_trim(read_header(toy), ["oe"], 265)


def read(source: Checkpoint, name: str) -> np.ndarray:
    """The tensor put together; each piece has to begin where the last one ended."""
    info = source.header.tensors[name]
    pieces, at = [], 0
    for start, piece in source.slabs(info):
        assert start == at
        at += len(piece)
        pieces.append(piece)
    return np.concatenate(pieces).reshape(info.shape)


def test_rows_by_token_are_cut_and_all_others_stay(toy: Path, plan: TrimPlan) -> None:
    n_tokens, header = plan.n_before, read_header(toy)
    arrays = {
        "token_embd.weight": tiny.grid((n_tokens, 8), 1),
        "output.weight": tiny.grid((n_tokens, 4), 2),
        "output.bias": tiny.grid((n_tokens,), 3),
        "blk.0.ffn_up.weight": tiny.grid((n_tokens, 4), 4),
        "output_norm.weight": tiny.grid((8,), 5),
    }
    fake = Fake(header, arrays)
    source: Checkpoint = TrimmedCheckpoint(fake, plan)
    for name in ("token_embd.weight", "output.weight", "output.bias"):
        np.testing.assert_array_equal(read(source, name), arrays[name][plan.kept])
        assert source.header.tensors[name].n_bytes == arrays[name][plan.kept].nbytes
    for name in ("blk.0.ffn_up.weight", "output_norm.weight"):
        np.testing.assert_array_equal(read(source, name), arrays[name])
    assert source.header.fields == plan.fields
    source.close()
    assert fake.closed


def test_no_slab_is_empty(toy: Path, plan: TrimPlan) -> None:
    arrays = {"token_embd.weight": tiny.grid((plan.n_before, 8), 1)}
    sparse = replace(plan, kept=np.array([0, 100, 266], np.int32))
    source = TrimmedCheckpoint(Fake(read_header(toy), arrays), sparse)
    slabs = list(source.slabs(source.header.tensors["token_embd.weight"]))
    assert [(start, len(rows)) for start, rows in slabs] == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("token_embd.weight", 266, "'token_embd.weight' has 266 rows for 267 tokens"),
        ("medusa.head.weight", 267, "'medusa.head.weight' seems to have a row for each token"),
    ],
)
def test_tensors_that_do_not_fit_the_vocabulary_are_refused(
    toy: Path, plan: TrimPlan, name: str, rows: int, said: str
) -> None:
    with pytest.raises(TrimImpossible, match=said):
        TrimmedCheckpoint(Fake(read_header(toy), {name: tiny.grid((rows, 8), 1)}), plan)


def write(source: Checkpoint, target: Path) -> Path:
    """Write a source as it is, in float32."""
    header = source.header
    layout = Layout(header.fields, [OutTensor(t.name, t.shape, F32) for t in header.tensors.values()], 32)
    write_gguf(target, layout, lambda name: (rows for _, rows in source.slabs(header.tensors[name])), lambda _: None)
    return target


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
def test_logits_of_kept_tokens_are_the_same(tmp_path: Path, architecture: str) -> None:
    whole = tiny.write_model(tmp_path / "whole.gguf", architecture)
    plan = plan_trim(read_header(whole), ["oe"], 265)
    with closing(GgufCheckpoint(whole)) as checkpoint:
        trimmed = write(TrimmedCheckpoint(checkpoint, plan), tmp_path / "trimmed.gguf")
    written = read_header(trimmed).fields[KEPT_FIELD].numbers or ()
    assert list(written) == plan.kept.tolist()
    options = LoadOptions(n_ctx=64, n_batch=64, n_seq_max=1, n_threads=1, gpu_layers=0)
    before, after = load(whole, options), load(trimmed, options)
    tokens = before.tokenizer.encode("oeoe\x07", add_special=True, parse_special=False)
    cut = after.tokenizer.encode("oeoe\x07", add_special=True, parse_special=False)
    assert cut == plan.new_ids[tokens].tolist()
    expected = last_logits(before, tokens)[plan.kept]
    before.close()
    np.testing.assert_array_equal(last_logits(after, cut), expected)
    after.close()
