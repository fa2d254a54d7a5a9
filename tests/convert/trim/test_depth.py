"""A base without some of its layers: the others stay as they are, with their kinds of attention."""

from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint.source import GgufCheckpoint
from convert.errors import RequestInvalid
from convert.trim.depth import ShallowCheckpoint
from models.gguf.header import Header
from tests.support.convert.tiny import write_model


def shallow(path: Path, kept: list[int]) -> ShallowCheckpoint:
    return ShallowCheckpoint(GgufCheckpoint(path), kept)


def pattern(header: Header) -> list[bool]:
    numbers = header.fields["gemma3.attention.sliding_window_pattern"].numbers
    assert numbers is not None
    return [bool(number) for number in numbers]


def test_the_layers_that_stay_keep_their_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf")
    source, cut = GgufCheckpoint(path), shallow(path, [1])
    assert cut.header.integer("gemma3.block_count") == 1
    names = {name for name in source.header.tensors if not name.startswith("blk.1.")}
    assert set(cut.header.tensors) == names
    for name in ("blk.0.ffn_up.weight", "token_embd.weight"):
        origin = source.header.tensors[name.replace("blk.0", "blk.1")]
        wanted, found = (
            np.concatenate([rows for _, rows in checkpoint.slabs(tensor)])
            for checkpoint, tensor in ((source, origin), (cut, cut.header.tensors[name]))
        )
        assert np.array_equal(wanted, found)
    cut.close()


def test_a_layer_keeps_its_kind_of_attention(tmp_path: Path) -> None:
    """Without a list llama.cpp would count again, and give a windowed layer's place to one with full attention."""
    path = write_model(tmp_path / "base.gguf")
    assert pattern(shallow(path, [0, 1]).header) == [True, True]
    once_cut = shallow(path, [0, 1])
    assert pattern(ShallowCheckpoint(once_cut, [1]).header) == [True]


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [2], [-1]])
def test_layers_that_are_not_there_are_refused(tmp_path: Path, kept: list[int]) -> None:
    path = write_model(tmp_path / "base.gguf")
    with pytest.raises(RequestInvalid, match=r"of 2: give some of 0 … 1, ascending"):
        shallow(path, kept)
