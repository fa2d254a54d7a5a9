"""What a run keeps on disk is read back as it was, and is never half there."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from convert.errors import FinetuneFailed, SourceInvalid
from convert.lora.adapter import read_adapter
from convert.training.base import DecoderShape
from convert.training.examples import NO_TARGETS, BatchShape, TokenBatch, TokenRow
from convert.training.settings import FinetuneSettings
from convert.training.storage import (
    CHECKPOINT_FILE,
    KeptStates,
    check_same,
    read_checkpoint,
    write_adapter,
    write_checkpoint,
)
from models.errors import StoreError

SHAPE = DecoderShape("llama", 8, 2, 1, 4, 12, 1e-5, (False,) * 3, 0, False, 0.5, 1.0, 0.0, 0.0)


def rows_of(*lengths: int) -> list[TokenRow]:
    return [TokenRow(np.arange(length, dtype=np.int32), NO_TARGETS) for length in lengths]


def test_states_are_read_back_at_the_ends_of_rows(tmp_path: Path) -> None:
    """Numbers beyond float16's range as well, to eleven bits of each token's largest."""
    rows = rows_of(3, 5, 2)
    chance = np.random.default_rng(0)
    true = [chance.standard_normal((n, 8)).astype(np.float32) * 10.0**scale for n, scale in ((3, 0), (5, 6), (2, -3))]
    batch = TokenBatch(BatchShape(4, 6, 1), (2, 0, 1))
    whole = np.zeros((4, 6, 8), np.float32)
    for place, member in enumerate(batch.members):
        whole[place, -len(true[member]) :] = true[member]
    states = KeptStates(tmp_path, "train", rows, 8, "key")
    assert not states.is_complete
    states.fill(iter([(batch, whole)]))
    again = KeptStates(tmp_path, "train", rows, 8, "key")
    assert again.is_complete
    other = TokenBatch(BatchShape(2, 5, 1), (1, 2))
    found = again.read(other)
    assert found.shape == (2, 5, 8)
    assert np.all(found[1, :3] == 0)
    largest = [np.abs(true[n]).max(axis=1, keepdims=True) for n in (1, 2)]
    assert np.all(np.abs(found[0] - true[1]) <= largest[0] * 2**-11)
    assert np.all(np.abs(found[1, 3:] - true[2]) <= largest[1] * 2**-11)
    again.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("lengths", "key"), [((3, 5, 2), "other"), ((3, 5, 3), "key")])
def test_states_of_other_rows_or_layers_are_not_used(tmp_path: Path, lengths: tuple[int, ...], key: str) -> None:
    states = KeptStates(tmp_path, "train", rows_of(3, 5, 2), 8, "key")
    batch = TokenBatch(BatchShape(3, 5, 1), (0, 1, 2))
    states.fill(iter([(batch, np.ones((3, 5, 8), np.float32))]))
    assert not KeptStates(tmp_path, "train", rows_of(*lengths), 8, key).is_complete


def test_states_that_were_not_finished_are_not_used(tmp_path: Path) -> None:
    rows = rows_of(3, 5)
    states = KeptStates(tmp_path, "train", rows, 8, "key")

    def stopped() -> Iterator[tuple[TokenBatch, np.ndarray]]:
        yield TokenBatch(BatchShape(1, 3, 1), (0,)), np.ones((1, 3, 8), np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        states.fill(stopped())
    assert not KeptStates(tmp_path, "train", rows, 8, "key").is_complete


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    tensors = {"b/0": np.arange(6, dtype=np.float32).reshape(2, 3), "a/1": np.ones(4, np.float32)}
    assert read_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, tensors, {"step": 3, "text": "é"})
    found, facts = read_checkpoint(tmp_path) or ({}, {})
    assert facts == {"step": 3, "text": "é"}
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": np.ones(4, np.float32)}, {})
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceInvalid, match=f"{CHECKPOINT_FILE}.*truncated"):
        read_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"a": np.ones(4, np.float32)}, {"step": 1})
    monkeypatch.setattr("models.common.files.MARGIN_BYTES", 1 << 60)
    with pytest.raises(StoreError, match="bytes are needed under"):
        write_checkpoint(tmp_path, {"a": np.zeros(4, np.float32)}, {"step": 2})
    found, facts = read_checkpoint(tmp_path) or ({}, {})
    assert facts == {"step": 1}
    assert np.array_equal(found["a"], np.ones(4))


def test_other_settings_are_named() -> None:
    with pytest.raises(FinetuneFailed, match=r"made with seed 1, asked is 2: .*another --out, or remove the file"):
        check_same({"seed": 1, "base": "b"}, {"base": "b", "seed": 2}, Path("out"))


def test_an_adapter_holds_the_targets_of_its_layers(tmp_path: Path) -> None:
    settings = FinetuneSettings(rank=2, alpha=6, targets=("q_proj", "v_proj", "down_proj"))
    chance = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return chance.standard_normal(shape).astype(np.float32)

    layer = {
        "qkv": (numbers(6, 8), numbers(16, 6)),
        "o": (numbers(2, 8), numbers(8, 2)),
        "gate_up": (numbers(4, 8), numbers(24, 4)),
        "down": (numbers(2, 12), numbers(8, 2)),
    }
    write_adapter(tmp_path, SHAPE, settings, 1, [layer, layer], "some-base")
    adapter = read_adapter(tmp_path)
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert set(adapter.loras) == {f"model.layers.{n}.{module}" for n in (1, 2) for module in modules}
    assert (adapter.rank, adapter.base) == (2, "some-base")
    value = adapter.loras["model.layers.2.self_attn.v_proj"]
    assert value.scale == 3
    assert np.array_equal(value.a, layer["qkv"][0][4:])  # after q's and k's rows
    assert np.array_equal(value.b, layer["qkv"][1][12:, 4:])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == [1, 2]
