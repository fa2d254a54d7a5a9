"""The time and memory that a fine-tune will take, from a few measured steps, and the choice of layers and epochs.

Every layer costs the same, so that a few steps with few layers tell the cost of any number of them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from convert.errors import FinetuneFailed
from models.common.machine import machine_budget

from .examples import LabelBranches, TokenBatch, TokenRow
from .settings import FinetuneSettings, TrainingCost
from .steps import DecoderSteps, shape_memory

REPETITIONS = 3
USUAL_EPOCHS = 3
# Two epochs are enough from so many steps on: of 952 mails, 119 steps an epoch, 259 of 296 others were right after two
# epochs and 258 after three.
ENOUGH_STEPS = 200
MOST_EPOCHS = 4


@dataclass(frozen=True)
class TrainingWork:
    """The rows of both splits with their batches; `scored`: the branches of labels behind validation's prompts."""

    rows: Sequence[TokenRow]
    batches: Sequence[TokenBatch]
    checked: Sequence[TokenRow]
    check_batches: Sequence[TokenBatch]
    scored: LabelBranches | None

    @property
    def n_shapes(self) -> float:
        """The number of shapes that are compiled; one for validation has no backward pass and counts half."""
        return len({batch.shape for batch in self.batches}) + len({batch.shape for batch in self.check_batches}) / 2


@dataclass(frozen=True)
class MeasuredCosts:
    """Seconds for a token in one layer, and for a shape's compilation. `last` is a training step's last layer."""

    frozen: float
    trained: float
    last: float
    compilation: float

    def seconds(self, work: TrainingWork, n_layers: int, layers: int, epochs: int) -> float:
        """The time of a run with `layers` of `n_layers` trained."""
        tokens, checked = padded_tokens(work.batches), padded_tokens(work.check_batches)
        once = (n_layers - layers) * self.frozen * (tokens + checked)
        epoch = tokens * (self.trained * (layers - 1) + self.last) + checked * self.frozen * layers
        return once + epochs * epoch + self.compilation * work.n_shapes


def padded_tokens(batches: Sequence[TokenBatch]) -> int:
    """The tokens of all batches, padding included."""
    return sum(batch.shape.rows * batch.shape.width for batch in batches)


def measure(steps: DecoderSteps, work: TrainingWork) -> MeasuredCosts:
    """Time a few steps of the most usual shape."""
    shapes = [batch.shape for batch in work.batches]
    usual = max(set(shapes), key=lambda shape: (shapes.count(shape), shape.width))
    batch = next(batch for batch in work.batches if batch.shape == usual)
    places = steps.places(work.rows, batch)
    x = np.zeros((usual.rows, usual.width, steps.shape.n_embd), np.float32)
    x += np.random.default_rng(0).standard_normal(x.shape, np.float32) * steps.shape.embedding_scale
    n_tokens, n_layers = usual.rows * usual.width, steps.shape.n_layers

    def gradients(n_trained: int) -> Callable[[], object]:
        steps.train_top(n_trained)
        parameters = steps.initial()
        return lambda: steps.gradients(parameters, x, places, work.rows, batch)

    few = min(4, n_layers)
    steps.train_top(n_layers - few)
    compile_frozen, frozen = _timed(lambda: steps.freeze(x, places))
    compile_few, several = _timed(gradients(few))
    _, one = _timed(gradients(1))
    inner = (several - one) / max(1, few - 1) if few > 1 else one
    return MeasuredCosts(
        frozen=frozen / few / n_tokens,
        trained=max(inner, frozen / few) / n_tokens,
        last=one / n_tokens,
        compilation=compile_frozen + compile_few,
    )


def choose(costs: MeasuredCosts, work: TrainingWork, steps: DecoderSteps) -> TrainingCost:
    """The layers and epochs to train: those asked for, else the most that `minutes` allows.

    Raises FinetuneFailed naming the options that would fit, when the time or the memory does not suffice.
    """
    n_layers, settings = steps.shape.n_layers, steps.settings
    # On mails the upper half was as good as all as far as 296 examples show, in less than half of the time.
    usual = 2 if 2 * len(work.batches) >= ENOUGH_STEPS else USUAL_EPOCHS
    most, most_epochs = (math.ceil(n_layers / 2), usual) if settings.minutes is None else (n_layers, MOST_EPOCHS)
    depths = [depth for depth in _depths(n_layers) if depth <= most]
    options = [
        TrainingCost(layers, epochs, costs.seconds(work, n_layers, layers, epochs), memory(work, steps, layers))
        for layers in ([settings.layers] if settings.layers is not None else depths)
        for epochs in ([settings.epochs] if settings.epochs is not None else range(most_epochs, 0, -1))
    ]
    budget = machine_budget()
    fitting = [one for one in options if budget is None or one.memory_bytes <= budget]
    if not fitting:
        raise FinetuneFailed(_too_large(min(options, key=lambda one: one.memory_bytes), budget or 0, settings))
    limit = settings.minutes * 60 if settings.minutes is not None else None
    quick = [one for one in fitting if limit is None or one.seconds <= limit]
    if not quick:
        fastest = min(fitting, key=lambda one: one.seconds)
        least = costs.seconds(work, n_layers, 1, 1)
        ways = [f"--minutes {math.ceil(fastest.seconds / 60)}"]
        if limit is not None and least <= limit:
            ways.append(f"--layers 1 --epochs 1 (about {least / 60:.1f} minutes)")
        raise FinetuneFailed(
            f"--minutes {settings.minutes:g} is too little for {fastest.layers} layers and {fastest.epochs} epochs on "
            f"this machine: measured steps say {fastest.seconds / 60:.1f} minutes; it would fit with "
            f"{' or '.join(ways)}, or with fewer examples"
        )
    # more epochs are worth more than more layers, until there are enough
    return max(quick, key=lambda one: (min(one.epochs, 3), one.layers, one.epochs))


def memory(work: TrainingWork, steps: DecoderSteps, layers: int) -> int:
    """The bytes that training `layers` takes beyond the weights: one step, the parameters and their moments."""
    shape, settings = steps.shape, steps.settings
    step = max(
        shape_memory(shape, batch.rows, batch.width, batch.n_last, steps.n_vocab, layers)
        for batch in {one.shape for one in (*work.batches, *work.check_batches)}
    )
    per_layer = shape.layer_elements
    if settings.method == "lora":
        per_layer = settings.rank * 4 * (2 * shape.n_embd + shape.n_ff + shape.n_head * shape.head_dim)
    return step + 16 * per_layer * layers


def _depths(n_layers: int) -> list[int]:
    """The numbers of top layers to choose from: all, and fewer where the time or the memory does not suffice."""
    return sorted({max(1, round(n_layers * share)) for share in (1, 3 / 4, 1 / 2, 1 / 3, 1 / 6)}, reverse=True)


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    """The extra seconds of a first run, with its compilation, and the seconds of a further one."""
    taken = []
    for _ in range(1 + REPETITIONS):
        start = time.monotonic()
        run()
        taken.append(time.monotonic() - start)
    usual = min(taken[1:])
    return max(0.0, taken[0] - usual), usual


def _too_large(least: TrainingCost, budget: int, settings: FinetuneSettings) -> str:
    mib = 1 << 20
    ways = ["a smaller --batch", "shorter examples (--max-tokens)"]
    if settings.layers != 1:
        ways.insert(0, "--layers 1")
    return (
        f"training {least.layers} layers takes about {least.memory_bytes // mib} MiB more, "
        f"{budget // mib} MiB are free: try {', '.join(ways)}, a base with a cut vocabulary, or close other programs"
    )
