"""A model cut in depth before it is trained: fewer layers to train, and to compute for every answer.

Layers from the middle go first. Of 9 layers that stay of Gemma 3's 18, the lowest 3 and the highest 6 are kept: in its
hidden states a linear probe finds the kind of a mail as well after the second layer as after the last, and the highest
layers are those that write.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint.source import open_checkpoint
from convert.errors import RequestInvalid
from convert.training.base import read_shape, write_shallow
from convert.training.settings import FinetuneResult, FinetuneSettings
from models.common.console import Reporter
from models.common.stats import CONFIDENCE, mcnemar_exact

ALL, AUTO = "all", "auto"
# What stays has to learn again to read its own states.
SHALLOW_EPOCHS = 4


@dataclass(frozen=True)
class TrainedDepth:
    """The result of training `depth` of a base's layers. `base`: the file that the adapter belongs to."""

    depth: int
    base: Path
    result: FinetuneResult


def train_depths(
    given: str,
    base: Path,
    settings: FinetuneSettings,
    train: Callable[[Path, FinetuneSettings, str], FinetuneResult],
    folder: Path,
    report: Reporter,
) -> TrainedDepth:
    """Train `base` with as many of its layers as `given` says: all, a number, or auto, which trains half and all.

    `folder` takes the cut bases. Raises RequestInvalid for more layers than there are, and what `train` raises.
    """
    with closing(open_checkpoint(base)) as checkpoint:
        n_layers = read_shape(checkpoint.header).n_layers
    depths, made = _depths(given, n_layers), []
    if settings.minutes is not None:
        settings = settings.model_copy(update={"minutes": settings.minutes / len(depths)})
    for depth in depths:
        if depth == n_layers:
            made.append(TrainedDepth(depth, base, train(base, settings, "")))
            continue
        shallow = folder / f"{base.stem}-{depth}-layers.gguf"
        if not shallow.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_shallow(base, kept_layers(n_layers, depth), shallow, report)
        changes = {"layers": settings.layers or depth, "epochs": settings.epochs or SHALLOW_EPOCHS}
        trained = train(shallow, settings.model_copy(update=changes), f"{depth}-layers")
        made.append(TrainedDepth(depth, shallow, trained))
    return _chosen(made, report) if len(made) > 1 else made[0]


def kept_layers(n_layers: int, depth: int) -> tuple[int, ...]:
    """The layers that stay: the lowest third of `depth`, and the highest two thirds."""
    lower = math.ceil(depth / 3)
    return (*range(lower), *range(n_layers - (depth - lower), n_layers))


def _depths(given: str, n_layers: int) -> tuple[int, ...]:
    if given == ALL:
        return (n_layers,)
    if given == AUTO:
        return (math.ceil(n_layers / 2), n_layers)
    if int(given) > n_layers:
        raise RequestInvalid(f"--depth {given}: the base has {n_layers} layers; give fewer, auto or all")
    return (int(given),)


def _chosen(made: Sequence[TrainedDepth], report: Reporter) -> TrainedDepth:
    """The shallow model, unless it is significantly worse on the validation examples (paired)."""
    shallow, whole = made
    answers = list(zip(shallow.result.best.right, whole.result.best.right, strict=True))
    lost, won = answers.count(("0", "1")), answers.count(("1", "0"))
    p_value = mcnemar_exact(lost, won)
    worse = lost > won and p_value < 1 - CONFIDENCE
    for one in made:
        best = one.result.best
        told = f"{one.depth} of {whole.depth} layers: accuracy {best.accuracy:.3f}" if best.accuracy is not None else ""
        report.note(f"{told} on the validation examples, trained in {one.result.seconds / 60:.1f} minutes")
    report.note(
        f"{lost} answers are lost and {won} won by the shallow one (p {p_value:.2g}): "
        + ("all layers stay" if worse else f"{shallow.depth} layers are kept, each answer costs that much less")
    )
    return whole if worse else shallow
