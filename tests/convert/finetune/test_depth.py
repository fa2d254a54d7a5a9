"""A model cut in depth: which layers stay, which depths are tried, and when fewer layers are enough."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from convert.checkpoint.source import open_checkpoint
from convert.errors import RequestInvalid
from convert.finetune.asked import AskedExamples
from convert.finetune.depth import SHALLOW_EPOCHS, BaseTools, DepthChoice, TrainedDepth, kept_layers, worth_trying
from convert.training.settings import EpochScore, FinetuneResult, FinetuneSettings, TrainingCost
from models.common.chat_records import read_chat_records
from models.common.console import LineReporter, Reporter
from models.manifest import BARE_PROMPT
from tests.support.convert.tiny import N_LAYERS, write_mails, write_model

TURNS = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
# Of six layers: depths 2, 3 and 4.
SIX = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base.gguf", "llama", template=TURNS)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> AskedExamples:
    records = list(read_chat_records(write_mails(tmp_path_factory.mktemp("mails") / "mails.jsonl")))
    return AskedExamples(records[:28], records[28:], BARE_PROMPT, FinetuneSettings())


@dataclass
class Trainer:
    """Notes what it is asked to train. `right`: the answers on validation by the folder's name ("" for all layers)."""

    right: Mapping[str, str]
    asked: list[tuple[str, int | None, int | None, float | None]] = field(default_factory=list)

    def __call__(self, base: Path, settings: FinetuneSettings, folder: str) -> FinetuneResult:
        self.asked.append((folder, settings.layers, settings.epochs, settings.minutes))
        right = self.right[folder]
        best = EpochScore(1, 0.1, 0.2, right.count("1") / len(right), kept=True, right=right)
        return FinetuneResult(Path(folder), best, (best,), TrainingCost(1, 1, 1.0, 1), 60.0, 60.0)


@dataclass(frozen=True)
class Tools:
    """Probe and speeds as they are given: twice as fast with half of the layers."""

    shares: tuple[float, ...]

    def probe(self, base: Path, asked: AskedExamples, report: Reporter) -> tuple[tuple[float, ...], int]:
        return self.shares, 100

    def speeds(self, files: Mapping[str, Path], asked: AskedExamples, report: Reporter) -> Mapping[str, float]:
        return {depth: 60 / int(depth) for depth in files}


def choice(
    base: Path, examples: AskedExamples, trainer: Trainer, folder: Path, *shares: float, minutes: float | None = None
) -> DepthChoice:
    asked = AskedExamples(examples.train, examples.validation, BARE_PROMPT, FinetuneSettings(minutes=minutes))
    return DepthChoice(base, asked, trainer, folder, LineReporter(), Tools(shares))


@pytest.mark.parametrize("depth", range(1, 19))
def test_layers_from_the_middle_go_first(depth: int) -> None:
    kept = kept_layers(18, depth)
    assert len(kept) == len(set(kept)) == depth
    assert sorted(kept) == list(kept)
    gaps = [after - before for before, after in pairwise(kept)]
    assert sum(gap > 1 for gap in gaps) <= 1
    assert 0 in kept
    assert depth == 1 or 17 in kept


def test_a_number_of_layers_is_kept(base: Path, examples: AskedExamples, tmp_path: Path) -> None:
    trainer = Trainer({"1-layers": "1101"})
    made = choice(base, examples, trainer, tmp_path / "cut").trained("1")
    assert trainer.asked == [("1-layers", 1, SHALLOW_EPOCHS, None)]
    assert (made.depth, made.base_depth, made.base) == (1, N_LAYERS, tmp_path / "cut" / "base-1-layers.gguf")
    checkpoint = open_checkpoint(made.base)
    assert checkpoint.header.integer("llama.block_count") == 1
    checkpoint.close()


def test_all_layers_are_kept_by_default(base: Path, examples: AskedExamples, tmp_path: Path) -> None:
    trainer = Trainer({"": "1101"})
    made = choice(base, examples, trainer, tmp_path / "cut").trained("all")
    assert trainer.asked == [("", None, None, None)]
    assert (made.depth, made.base, made.tried) == (N_LAYERS, base, ())
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize(
    ("shares", "depths"),
    [
        # the states after the first layer tell as much as all: one lower layer is enough, of 6, 9 and 12
        ((0.8,) * 18, (6, 9)),
        # two layers are needed, within the standard error of 100 examples (0.04)
        ((0.5, 0.77, *(0.8,) * 16), (6, 9)),
        ((0.5, 0.7, 0.77, *(0.8,) * 15), (9, 12)),
        ((0.5, 0.6, 0.7, 0.77, *(0.8,) * 14), (12,)),
        # five: more than the lowest third of 12
        ((0.5, 0.6, 0.65, 0.7, 0.77, *(0.8,) * 13), ()),
        # nothing is told before the last layer
        ((*(0.1,) * 17, 0.8), ()),
        # two layers: one of them, unless both are needed
        ((0.8, 0.8), (1,)),
        ((0.1, 0.8), ()),
        ((1.0, 1.0, 1.0), (1, 2)),
    ],
)
def test_depths_are_tried_that_have_the_layers_that_read(shares: tuple[float, ...], depths: tuple[int, ...]) -> None:
    assert worth_trying(shares, 100) == depths


WHOLE = "1" * 95 + "0" * 5


@pytest.mark.parametrize(
    ("shallow", "kept"),
    [("1" * 90 + "0" * 10, 1), ("1" * 94 + "0" * 6, 1), ("1" * 80 + "0" * 20, N_LAYERS), ("1" * 100, 1)],
)
def test_fewer_layers_are_kept_unless_they_are_significantly_worse(
    base: Path, examples: AskedExamples, tmp_path: Path, shallow: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer({"1-layers": shallow, "": WHOLE})
    made = choice(base, examples, trainer, tmp_path, 0.8, 0.8, minutes=30).trained("auto")
    assert [asked[0] for asked in trainer.asked] == ["", "1-layers"]
    assert {asked[3] for asked in trainer.asked} == {15}, "the time is shared out"
    assert made.depth == kept
    right, told = shallow.count("1"), capsys.readouterr().err
    assert f"1 of {N_LAYERS} layers: {right} of 100 validation examples right ({right - 95:+.1f} points" in told
    assert "2.0 times as fast" in told
    whole, tried = made.tried
    assert (whole.layers, whole.correct, whole.difference_low <= 0 <= whole.difference_high) == (N_LAYERS, 95, True)
    assert (tried.layers, tried.correct, tried.examples_per_s) == (1, right, 60)
    assert tried.difference_low <= (right - 95) / 100 <= tried.difference_high


@pytest.mark.parametrize(
    ("right", "kept", "tried"),
    [
        ({"2-layers": WHOLE}, 2, 2),
        ({"2-layers": "1" * 70 + "0" * 30, "3-layers": WHOLE}, 3, 3),
        ({"2-layers": "1" * 70 + "0" * 30, "3-layers": "1" * 75 + "0" * 25}, SIX, 3),
    ],
)
def test_more_layers_are_tried_only_if_fewer_are_worse(
    base: Path, examples: AskedExamples, tmp_path: Path, right: dict[str, str], kept: int, tried: int
) -> None:
    trainer = Trainer({"": WHOLE, **right})
    one = choice(base, examples, trainer, tmp_path, *(0.8,) * SIX)
    one.n_layers = SIX
    for depth in (2, 3):  # as cut before: the stand-in for a base has two layers
        (tmp_path / f"base-{depth}-layers.gguf").touch()
    made = one.trained("auto")
    assert made.depth == kept
    assert [row.layers for row in made.tried] == [SIX, 2, 3][:tried]
    assert len(made.probe) == SIX


def test_no_fewer_layers_are_trained_where_all_are_needed_to_read(
    base: Path, examples: AskedExamples, tmp_path: Path
) -> None:
    trainer = Trainer({"": WHOLE})
    made = choice(base, examples, trainer, tmp_path, 0.2, 0.8, minutes=30).trained("auto")
    assert [asked[0::3] for asked in trainer.asked] == [("", 30)]
    assert isinstance(made, TrainedDepth)
    assert (made.depth, made.tried) == (N_LAYERS, ())


def test_more_layers_than_there_are_is_refused(base: Path, examples: AskedExamples, tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match=rf"--depth 3: the base has {N_LAYERS} layers; give fewer, auto or all"):
        choice(base, examples, Trainer({}), tmp_path).trained("3")


@pytest.mark.finetune
def test_the_probe_and_the_speeds_of_a_real_base(base: Path, examples: AskedExamples, tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="needs the extra `finetune`")
    tools = BaseTools(("ham", "spam"))
    shares, n_held = tools.probe(base, examples, LineReporter())
    assert (len(shares), n_held) == (N_LAYERS, len(examples.validation))
    # mails of both kinds differ by a word, which is in their mean state
    assert min(shares) == 1.0
    assert set(tools.speeds({"2": base}, examples, LineReporter())) == {"2"}
