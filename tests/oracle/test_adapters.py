"""Adapters merged by us and by PEFT: the same weights, through the row order and the norms of each family."""

from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint.source import open_checkpoint
from convert.lora.adapter import read_adapter
from convert.lora.fit import MergedCheckpoint, fit

from .families import ADAPTERS, AdapterCase
from .ours import read_tensors, write

pytestmark = pytest.mark.oracle

MAX_DIFFERENCE = 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_merged_weights_are_those_of_peft(adapter: AdapterCase, references: Path, tmp_path: Path) -> None:
    base = open_checkpoint(references / "ckpt" / adapter.base)
    merged = MergedCheckpoint(base, fit(read_adapter(references / "adapters" / adapter.name), base.header))
    made = read_tensors(write(merged, tmp_path / "merged.gguf", "f32"))
    theirs = read_tensors(references / "ref" / f"adapter-{adapter.name}-f32.gguf")
    assert {name: tensor[:2] for name, tensor in made.items()} == {name: tensor[:2] for name, tensor in theirs.items()}
    differences = {name: _difference(made[name][2], theirs[name][2]) for name in theirs}
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < MAX_DIFFERENCE, worst


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_the_adapters_change_what_they_name(adapter: AdapterCase, references: Path) -> None:
    """Equal weights say nothing of an adapter that changes none: PEFT's own merge differs from the base."""
    base = read_tensors(references / "ref" / f"{adapter.base}-f32.gguf")
    theirs = read_tensors(references / "ref" / f"adapter-{adapter.name}-f32.gguf")
    changed = [name for name in theirs if _difference(theirs[name][2], base[name][2]) > 1000 * MAX_DIFFERENCE]
    assert len(changed) >= 4


def _difference(one: bytes, two: bytes) -> float:
    return float(np.abs(np.frombuffer(one, np.float32) - np.frombuffer(two, np.float32)).max())
