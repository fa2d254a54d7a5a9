"""Settings and results of a training. Options of `deskside finetune` are generated from here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from models.common.options import AutoInt, Flag

Method = Literal["lora", "full"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


AUTO_TOKENS = -1
"""`tokens` to be chosen on the validation examples."""
_TOKENS = (8, 4096)


def _auto_tokens(value: object) -> object:
    return AUTO_TOKENS if isinstance(value, str) and value.strip().lower() == "auto" else value


def _possible_tokens(value: int | None) -> int | None:
    if value not in (None, AUTO_TOKENS) and not _TOKENS[0] <= value <= _TOKENS[1]:
        raise ValueError(f"must be auto, or {_TOKENS[0]} to {_TOKENS[1]}")
    return value


TextLength = Annotated[int | None, BeforeValidator(_auto_tokens), AfterValidator(_possible_tokens)]


class FinetuneSettings(BaseModel):
    """Settings of the training.

    `layers` and `epochs` None: as many as `minutes` allows; without it the upper half of the layers, three
    times, or twice if that is 200 steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field(default="lora", description="Train low-rank adapters, or whole matrices.")
    layers: AutoInt = Field(default=None, ge=1, le=1000, description="Train the top N layers only.")
    epochs: AutoInt = Field(default=None, ge=1, le=100, description="Passes over the examples, at most.")
    minutes: float | None = Field(default=None, gt=0, description="Choose layers and epochs to finish in this time.")
    seed: int = Field(default=7, ge=0, le=2**31 - 1, description="Seed of the order of examples and of the adapters.")
    batch: int = Field(default=8, ge=1, le=256, description="Examples in a training step.")
    learning_rate: float = Field(default=5e-4, gt=0, le=1, description="Highest learning rate.")
    rank: int = Field(default=16, ge=1, le=256, description="Rank of the adapters.")
    alpha: float = Field(default=32, gt=0, le=4096, description="Scale of the adapters times their rank.")
    targets: Annotated[tuple[str, ...], Flag(metavar="NAMES", shown="all seven")] = Field(
        default=PROJECTIONS, description="Projections that get an adapter."
    )
    tokens: Annotated[TextLength, Flag(metavar="auto|N", shown="the task's")] = Field(
        default=None, description="Cut texts to N tokens, or to a length chosen on the validation examples."
    )
    max_tokens: int = Field(default=512, ge=16, le=4096, description="Leave out longer examples.")
    warmup: float = Field(default=0.06, ge=0, le=0.5, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="AdamW's weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Longest gradient; longer ones are shortened to it.")
    patience: int = Field(default=2, ge=1, le=100, description="Stop after so many epochs without a better one.")


@dataclass(frozen=True)
class TrainingCost:
    """An estimate made from measured steps. `seconds` excludes what a resumed run has done already."""

    layers: int
    epochs: int
    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class EpochScore:
    """One epoch's validation. `accuracy` is None for work to write; `loss` is a mean over answers' tokens.

    `right` has 1 or 0 for each validation example, in their order.
    """

    epoch: int
    train_loss: float
    loss: float
    accuracy: float | None
    kept: bool
    right: str = ""

    def is_better_than(self, other: "EpochScore | None") -> bool:
        """True if the score is higher: by accuracy where there is one, then by loss."""
        return other is None or self._rank() > other._rank()

    def _rank(self) -> tuple[float, float]:
        return self.accuracy if self.accuracy is not None else 0.0, -self.loss


@dataclass(frozen=True)
class FinetuneResult:
    """A finished fine-tune. `trained`: an adapter's folder (lora), or a GGUF file (full). `losses`: of each step."""

    trained: Path
    best: EpochScore
    epochs: tuple[EpochScore, ...]
    cost: TrainingCost
    seconds: float
    cpu_seconds: float
    seed: int = 0
    losses: tuple[float, ...] = ()
