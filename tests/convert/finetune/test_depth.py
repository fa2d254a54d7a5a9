"""A model cut in depth: which layers stay, and when half of them are enough."""

from itertools import pairwise
from pathlib import Path

import pytest

from convert.checkpoint.source import open_checkpoint
from convert.errors import RequestInvalid
from convert.finetune.depth import SHALLOW_EPOCHS, kept_layers, train_depths
from convert.training.settings import EpochScore, FinetuneResult, FinetuneSettings, TrainingCost
from models.common.console import LineReporter
from tests.support.convert.tiny import N_LAYERS, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base.gguf", "llama")


class Trainer:
    """Notes what it is asked to train; the answers on validation are given by the folder's name."""

    def __init__(self, **right: str) -> None:
        self.right = right
        self.asked: list[tuple[int, int | None, int | None, float | None]] = []

    def __call__(self, base: Path, settings: FinetuneSettings, folder: str) -> FinetuneResult:
        checkpoint = open_checkpoint(base)
        n_layers = checkpoint.header.integer("llama.block_count")
        checkpoint.close()
        self.asked.append((n_layers, settings.layers, settings.epochs, settings.minutes))
        right = self.right["shallow" if folder else "whole"]
        best = EpochScore(1, 0.1, 0.2, right.count("1") / len(right), kept=True, right=right)
        return FinetuneResult(Path(folder), best, (best,), TrainingCost(1, 1, 1.0, 1), 60.0, 60.0)


@pytest.mark.parametrize("depth", range(1, 19))
def test_layers_from_the_middle_go_first(depth: int) -> None:
    kept = kept_layers(18, depth)
    assert len(kept) == len(set(kept)) == depth
    assert sorted(kept) == list(kept)
    gaps = [after - before for before, after in pairwise(kept)]
    assert sum(gap > 1 for gap in gaps) <= 1
    assert 0 in kept
    assert depth == 1 or 17 in kept


def test_a_number_of_layers_is_kept(base: Path, tmp_path: Path) -> None:
    trainer = Trainer(shallow="1101")
    made = train_depths("1", base, FinetuneSettings(), trainer, tmp_path / "cut", LineReporter())
    assert trainer.asked == [(1, 1, SHALLOW_EPOCHS, None)]
    assert (made.depth, made.base) == (1, tmp_path / "cut" / "base-1-layers.gguf")


def test_all_layers_are_kept_by_default(base: Path, tmp_path: Path) -> None:
    trainer = Trainer(whole="1101")
    made = train_depths("all", base, FinetuneSettings(), trainer, tmp_path / "cut", LineReporter())
    assert trainer.asked == [(N_LAYERS, None, None, None)]
    assert (made.depth, made.base) == (N_LAYERS, base)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("shallow", "kept"),
    [("1" * 90 + "0" * 10, 1), ("1" * 94 + "0" * 6, 1), ("1" * 80 + "0" * 20, N_LAYERS), ("1" * 100, 1)],
)
def test_half_is_kept_unless_it_is_significantly_worse(
    base: Path, tmp_path: Path, shallow: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(shallow=shallow, whole="1" * 95 + "0" * 5)
    made = train_depths("auto", base, FinetuneSettings(minutes=30), trainer, tmp_path / "cut", LineReporter())
    assert [asked[0] for asked in trainer.asked] == [1, N_LAYERS]
    assert {asked[3] for asked in trainer.asked} == {15}
    assert made.depth == kept
    told = capsys.readouterr().err
    assert f"1 of {N_LAYERS} layers: accuracy {shallow.count('1') / 100:.3f}" in told
    assert f"{max(0, 95 - shallow.count('1'))} answers are lost" in told


def test_more_layers_than_there_are_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match=rf"--depth 3: the base has {N_LAYERS} layers; give fewer, auto or all"):
        train_depths("3", base, FinetuneSettings(), Trainer(), tmp_path / "cut", LineReporter())
