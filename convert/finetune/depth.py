"""A model cut in depth before it is trained: fewer layers to train, and to compute for every answer.

Layers from the middle go first. Of 9 layers that stay of Gemma 3's 18, the lowest 3 and the highest 6 are kept: in its
hidden states a linear probe finds the kind of a mail as well after the second layer as after the last, and the highest
layers are those that write.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from convert.checkpoint.source import open_checkpoint
from convert.errors import RequestInvalid
from convert.measure.speed import ServingLoad, measure_speeds
from convert.training.base import read_shape, write_shallow
from convert.training.examples import tokenizer_for
from convert.training.probe import probe_layers
from convert.training.settings import FinetuneResult, FinetuneSettings
from models.common.console import Reporter
from models.common.stats import CONFIDENCE, compare_paired
from models.training import TriedDepth

from .asked import AskedExamples

ALL, AUTO = "all", "auto"
# What stays has to learn again to read its own states.
SHALLOW_EPOCHS = 4
# Trainings with fewer layers, at most.
MAX_TRIED = 2
SPEED_ROUNDS = 2

Train = Callable[[Path, FinetuneSettings, str], FinetuneResult]


@dataclass(frozen=True)
class TrainedDepth:
    """The result of training `depth` of a base's `base_depth` layers. `base`: the file that the adapter belongs to.

    Where several depths were trained, `tried` are all of them, and `probe` is what the choice of them was made by.
    """

    depth: int
    base_depth: int
    base: Path
    result: FinetuneResult
    probe: tuple[float, ...] = ()
    tried: tuple[TriedDepth, ...] = ()


class DepthTools(Protocol):
    """The measurements that choose a depth; tests replace them."""

    def probe(self, base: Path, asked: AskedExamples, report: Reporter) -> tuple[tuple[float, ...], int]:
        """The accuracy of a linear model on the states after each layer, and the number of examples it is of."""
        ...

    def speeds(self, files: Mapping[str, Path], asked: AskedExamples, report: Reporter) -> Mapping[str, float]:
        """Examples a second of each file that can be timed."""
        ...


@dataclass(frozen=True)
class BaseTools:
    """The tools on real bases. `labels`: the task's own, in its order."""

    labels: Sequence[str]

    def probe(self, base: Path, asked: AskedExamples, report: Reporter) -> tuple[tuple[float, ...], int]:
        """The accuracy of a linear model on the states after each layer, and the number of examples it is of."""
        return probe_layers(base, asked.train, asked.validation, self.labels, asked.settings, report)

    def speeds(self, files: Mapping[str, Path], asked: AskedExamples, report: Reporter) -> Mapping[str, float]:
        """Examples a second of each file that can be timed: prompts of usual length, a label of three tokens scored."""
        with closing(open_checkpoint(next(iter(files.values())))) as checkpoint:
            tokenizer = tokenizer_for(checkpoint, asked.train)
        texts = (record.prompt[-1].content for record in asked.validation)
        lengths = [len(tokenizer.encode(text, add_special=False, parse_special=False)) for text in texts]
        load = ServingLoad("classify", max(1, min(round(statistics.median(lengths)), 2048)), 3)
        report.stage(f"time {len(files)} depths on this machine")
        return measure_speeds(files, load, report.advance, rounds=SPEED_ROUNDS).scores


@dataclass
class DepthChoice:
    """The training of a base at the depth that is given, or at the fewest layers that lose nothing.

    `folder` takes the cut bases; `train` is given a base, its settings and the name of a folder for it.
    """

    base: Path
    asked: AskedExamples
    train: Train
    folder: Path
    report: Reporter
    tools: DepthTools
    n_layers: int = field(init=False)

    def __post_init__(self) -> None:
        with closing(open_checkpoint(self.base)) as checkpoint:
            self.n_layers = read_shape(checkpoint.header).n_layers

    def trained(self, given: str) -> TrainedDepth:
        """Train with all layers, with a number of them, or choose (auto).

        Raises RequestInvalid for more layers than there are, and what `train` raises.
        """
        if given == AUTO:
            return self._chosen()
        depth = self.n_layers if given == ALL else int(given)
        if depth > self.n_layers:
            raise RequestInvalid(f"--depth {given}: the base has {self.n_layers} layers; give fewer, auto or all")
        return self._train(depth, self.asked.settings)

    def _chosen(self) -> TrainedDepth:
        """All layers, and then fewer, until so few lose nothing significant on the validation examples (paired)."""
        probe, n_held = self.tools.probe(self.base, self.asked, self.report)
        depths = worth_trying(probe, n_held)
        self.report.note(_probe_told(probe, depths))
        settings = self.asked.settings
        if settings.minutes is not None:
            settings = settings.model_copy(update={"minutes": settings.minutes / (1 + len(depths))})
        whole = chosen = self._train(self.n_layers, settings)
        made = [whole]
        for depth in depths:
            made.append(self._train(depth, settings))
            if not _is_worse(made[-1].result, whole.result):
                chosen = made[-1]
                break
        tried = self._ladder(made) if len(made) > 1 else ()
        for one in tried:
            self.report.note(_told(one, tried[0]))
        if len(made) > 1:
            self.report.note(f"{chosen.depth} layers are kept, the fewest tried that lose nothing significant")
        return replace(chosen, probe=probe, tried=tried)

    def _train(self, depth: int, settings: FinetuneSettings) -> TrainedDepth:
        if depth == self.n_layers:
            return TrainedDepth(depth, depth, self.base, self.train(self.base, settings, ""))
        shallow = self.folder / f"{self.base.stem}-{depth}-layers.gguf"
        if not shallow.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_shallow(self.base, kept_layers(self.n_layers, depth), shallow, self.report)
        changes = {"layers": settings.layers or depth, "epochs": settings.epochs or SHALLOW_EPOCHS}
        result = self.train(shallow, settings.model_copy(update=changes), f"{depth}-layers")
        return TrainedDepth(depth, self.n_layers, shallow, result)

    def _ladder(self, made: Sequence[TrainedDepth]) -> tuple[TriedDepth, ...]:
        """Each depth that was trained, the whole first, with its speed where it can be timed."""
        speeds = self.tools.speeds({str(one.depth): one.base for one in made}, self.asked, self.report)
        return tuple(_tried(one, made[0], speeds.get(str(one.depth))) for one in made)


def kept_layers(n_layers: int, depth: int) -> tuple[int, ...]:
    """The layers that stay: the lowest third of `depth`, and the highest two thirds."""
    lower = math.ceil(depth / 3)
    return (*range(lower), *range(n_layers - (depth - lower), n_layers))


def worth_trying(probe: Sequence[float], n_held: int) -> tuple[int, ...]:
    """Depths to train beside all layers, the fewest first: those with all layers that are needed to read a text.

    A layer is needed if the states before it are worse than the best by more than their standard error, `probe` being
    shares of `n_held` examples.
    """
    n_layers, best = len(probe), max(probe)
    error = math.sqrt(best * (1 - best) / n_held)
    needed = 1 + next(layer for layer, share in enumerate(probe) if share >= best - error)
    depths = sorted({math.ceil(n_layers * share) for share in (1 / 3, 1 / 2, 2 / 3)} - {n_layers})
    return tuple(depth for depth in depths if math.ceil(depth / 3) >= needed)[:MAX_TRIED]


def _probe_told(probe: Sequence[float], depths: Sequence[int]) -> str:
    best = max(range(len(probe)), key=lambda layer: probe[layer])
    told = f"a linear model on the states after layer 1 is right for {probe[0]:.3f}, after layer {best + 1} for "
    told += f"{probe[best]:.3f}: "
    if not depths:
        return f"{told}most layers are needed to read these texts, none is left out"
    return f"{told}{' and then '.join(map(str, depths))} of {len(probe)} layers may be enough"


def _answers(result: FinetuneResult) -> list[bool]:
    return [one == "1" for one in result.best.right]


def _is_worse(shallow: FinetuneResult, whole: FinetuneResult) -> bool:
    paired = compare_paired(_answers(shallow), _answers(whole))
    return paired.difference.estimate < 0 and paired.p_value < 1 - CONFIDENCE


def _tried(one: TrainedDepth, whole: TrainedDepth, per_s: float | None) -> TriedDepth:
    right, paired = _answers(one.result), compare_paired(_answers(one.result), _answers(whole.result))
    return TriedDepth(
        layers=one.depth,
        correct=sum(right),
        total=len(right),
        difference_low=paired.difference.low,
        difference_high=paired.difference.high,
        p_value=paired.p_value,
        examples_per_s=per_s,
        seconds=one.result.seconds,
    )


def _told(one: TriedDepth, whole: TriedDepth) -> str:
    told = f"{one.layers} of {whole.layers} layers: {one.correct} of {one.total} validation examples right"
    if one is not whole:
        points = 100 * (one.correct - whole.correct) / one.total
        told += f" ({points:+.1f} points, p {one.p_value:.2g})"
    if one is not whole and one.examples_per_s and whole.examples_per_s:
        told += f", {one.examples_per_s / whole.examples_per_s:.1f} times as fast"
    return f"{told}, trained in {one.seconds / 60:.1f} minutes"
