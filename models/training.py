"""The training of a fine-tune, as a manifest keeps it and a card tells it."""

from typing import Annotated, Literal

from pydantic import Field

from models.common.record import Record, Share

MAX_LOSSES = 60
"""Points of a training's curve; more steps are means of several."""


class Epoch(Record):
    """The scores after a pass over the examples: mean losses of answer tokens, and for labels the accuracy."""

    train_loss: float
    loss: float
    accuracy: Share | None = None


class TriedDepth(Record):
    """A training with `layers` of the base's layers, judged on the same validation examples as that with all.

    `difference_low` … `difference_high`: 95 % interval of the accuracy less that of all layers (Newcombe, paired),
    `p_value`: exact McNemar. `examples_per_s`: base files of either depth, timed in turns, half precision.
    """

    layers: Annotated[int, Field(gt=0)]
    correct: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(gt=0)]
    difference_low: float = 0.0
    difference_high: float = 0.0
    p_value: Share = 1.0
    examples_per_s: float | None = None
    seconds: float


class Training(Record):
    """A finished training. `layers` at the top of `depth` were trained; the base has `base_depth`.

    `losses`: training losses from the first step to the last, in as many spans of equal length. `probe`: accuracy of a
    linear model on the mean hidden states after each layer of the base, if the depth was chosen by it.
    """

    task: str
    machine: str
    method: Literal["lora", "full"]
    examples: Annotated[int, Field(gt=0)]
    validation_examples: Annotated[int, Field(ge=0)]
    base_depth: Annotated[int, Field(gt=0)]
    depth: Annotated[int, Field(gt=0)]
    layers: Annotated[int, Field(gt=0)]
    learning_rate: float
    batch: int
    seed: int
    seconds: float
    cpu_seconds: float
    best_epoch: Annotated[int, Field(gt=0)]
    epochs: tuple[Epoch, ...]
    losses: tuple[float, ...] = ()
    probe: tuple[Share, ...] = ()
    depths: tuple[TriedDepth, ...] = ()
