"""A card's section about the training: how it was done, its curve, and the depths that were tried."""

from collections.abc import Iterator, Sequence

from models.training import Training, TriedDepth

from .markdown import table
from .svg import line, nice, opening, text

CURVE_FILE = "training.svg"

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 700, 62, 244
_STYLE = """
.loss { fill: none; stroke: #0969da; stroke-width: 2 }
.held { fill: none; stroke: #bc4c00; stroke-width: 2 }
.held-dot { fill: #bc4c00 } .best { fill: #1a7f37; stroke: #1f2328; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
.loss { stroke: #4493f8 } .held { stroke: #db6d28 } .held-dot { fill: #db6d28 }
.best { fill: #3fb950; stroke: #f0f6fc }
}"""


def render_training(training: Training) -> str:
    """The section's text, without its heading."""
    parts = [
        _told(training),
        f"![Loss and validation score over the training]({CURVE_FILE})" if len(training.losses) > 1 else "",
        table(("Epoch", "Training loss", "Validation loss", "Validation accuracy"), _epochs(training)),
        _depths(training),
    ]
    return "\n\n".join(part for part in parts if part)


def _told(training: Training) -> str:
    all_layers = "all" if training.layers == training.depth else f"the top {training.layers}"
    of = f"{training.depth} layers"
    if training.depth < training.base_depth:
        of += f", which are left of the base's {training.base_depth}"
    how = "Low-rank adapters" if training.method == "lora" else "Whole matrices"
    return (
        f"{how} in {all_layers} of {of}, trained on {training.examples} examples of the task `{training.task}`: "
        f"{training.batch} a step, learning rate {training.learning_rate:g}, seed {training.seed}. It took "
        f"{training.seconds / 60:.1f} minutes ({training.cpu_seconds / 60:.1f} of processor time) on "
        f"{training.machine}. Epoch {training.best_epoch} is kept, the best on {training.validation_examples} "
        "validation examples."
    )


def _epochs(training: Training) -> Iterator[Sequence[str]]:
    for number, epoch in enumerate(training.epochs, 1):
        mark = "**" if number == training.best_epoch else ""
        accuracy = "–" if epoch.accuracy is None else f"{epoch.accuracy:.3f}"
        cells = (str(number), f"{epoch.train_loss:.3f}", f"{epoch.loss:.3f}", accuracy)
        yield tuple(f"{mark}{cell}{mark}" for cell in cells)


def _depths(training: Training) -> str:
    if not training.depths:
        return ""
    fastest = next(one.examples_per_s for one in training.depths if one.layers == training.base_depth)
    head = ("Layers", "Right on validation", "Less than all layers, 95 %", "Examples/s, base as F16", "Trained in")
    parts = [table(head, (_depth_row(one, fastest, training) for one in training.depths))]
    if training.probe:
        probe = ", ".join(f"{share:.3f}" for share in training.probe)
        parts.append(f"Accuracy of a linear model on the base's mean hidden states after each layer: {probe}.")
    return (
        "Fewer layers make every answer cheaper. The fewest that lose nothing significant are kept:\n\n"
        + "\n\n".join(parts)
    )


def _depth_row(one: TriedDepth, whole_per_s: float | None, training: Training) -> Sequence[str]:
    mark = "**" if one.layers == training.depth else ""
    difference = "–"
    if one.layers < training.base_depth:
        difference = f"{one.difference_low:+.3f} to {one.difference_high:+.3f} (p = {one.p_value:.2g})"
    speed = "–"
    if one.examples_per_s is not None and whole_per_s is not None:
        speed = f"{one.examples_per_s:.3g} ({one.examples_per_s / whole_per_s:.2f}×)"
    right = f"{one.correct / one.total:.3f} ({one.correct} of {one.total})"
    cells = (f"{one.layers} of {training.base_depth}", right, difference, speed, f"{one.seconds / 60:.1f} min")
    return tuple(f"{mark}{cell}{mark}" for cell in cells)


def render_curve(training: Training) -> str | None:
    """The picture: training loss over the steps, and validation loss (or share of errors) after each epoch.

    None without losses of at least two spans.
    """
    if len(training.losses) < 2:
        return None
    held = [epoch.loss if epoch.accuracy is None else 1 - epoch.accuracy for epoch in training.epochs]
    name = "validation loss" if training.epochs[0].accuracy is None else "share of validation answers wrong"
    # The first losses may be ten times the rest: they leave the picture at its top.
    top = max(min(max(training.losses), 2 * _usual(training.losses)), *held)
    step = nice(top / 4)

    def x(share: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * share

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * min(value, top) / top

    n, epochs = len(training.losses), len(training.epochs)
    points = " ".join(f"{x((place + 0.5) / n):.1f},{y(loss):.1f}" for place, loss in enumerate(training.losses))
    after = [(x((number + 1) / epochs), y(value)) for number, value in enumerate(held)]
    parts = [
        opening(_WIDTH, _HEIGHT, "Loss and validation score over the training", _STYLE),
        text(_LEFT, 24, f"Training on {training.examples} examples", "title"),
        line(_LEFT, 42, _LEFT + 22, 42, "loss"),
        text(_LEFT + 28, 46, "training loss", "small"),
        line(_LEFT + 130, 42, _LEFT + 152, 42, "held"),
        text(_LEFT + 158, 46, f"{name} (large dot: kept)", "small"),
    ]
    for index in range(int(top / step) + 1):
        at = y(index * step)
        parts += [
            line(_LEFT, at, _RIGHT, at, "grid" if index else "axis"),
            text(_LEFT - 8, at + 4, f"{index * step:.4g}", "small", "end"),
        ]
    for number in range(epochs + 1):
        parts.append(text(x(number / epochs), _BOTTOM + 18, str(number), "small", "middle"))
    parts += [
        text((_LEFT + _RIGHT) / 2, _BOTTOM + 40, "epochs", "small", "middle"),
        f'<polyline points="{points}" class="loss"/>',
        f'<polyline points="{" ".join(f"{left:.1f},{down:.1f}" for left, down in after)}" class="held"/>',
    ]
    for number, (left, down) in enumerate(after, 1):
        kept = number == training.best_epoch
        parts.append(
            f'<circle cx="{left:.1f}" cy="{down:.1f}" r="{6 if kept else 4}" class="{"best" if kept else "held-dot"}"/>'
        )
        shown = training.epochs[number - 1].accuracy
        label = f"{shown:.1%} right" if shown is not None else f"{held[number - 1]:.3f}"
        anchor = "end" if number == epochs else "middle"
        parts.append(text(left + (8 if anchor == "end" else 0), down - 10, label, "small", anchor))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _usual(losses: Sequence[float]) -> float:
    """The loss that nine in ten spans stay below."""
    return sorted(losses)[len(losses) * 9 // 10]
