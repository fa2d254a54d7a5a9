"""A model's calibration, as its manifest keeps it and its card tells it. Reading it needs no numpy."""

from typing import Annotated

from pydantic import Field, model_validator

from models.common.record import Record, Share

TARGETS = (0.95, 0.97, 0.99)
"""The targets that thresholds are recorded for, unless the user names others."""
DEFAULT_TARGET = 0.97
"""The target that applies where the user named none."""

Target = Annotated[float, Field(ge=0.5, lt=1)]


class Bin(Record):
    """Some examples of like confidence: the mean of it, and how many of their answers are right."""

    confidence: Share
    right: Annotated[int, Field(ge=0)]
    total: Annotated[int, Field(gt=0)]


class Promise(Record):
    """A target, and the confidence from which answers keep it; without a `threshold` no answer is automatic.

    Of the calibration examples `automatic` reach the threshold, and `right` of those are right. `bound` is the exact
    lower limit of the accuracy from there on (Clopper-Pearson, 95 %). Without a threshold, `needed` is the
    estimated number of calibration examples that would be enough; absent where more examples would not help.
    """

    target: Target
    threshold: Share | None = None
    automatic: Annotated[int, Field(ge=0)] = 0
    right: Annotated[int, Field(ge=0)] = 0
    bound: Share | None = None
    needed: Annotated[int, Field(gt=0)] | None = None


class Calibration(Record):
    """The fit of a model's label probabilities to `examples` held-out examples, described by `source`.

    `temperature` divides log-probabilities. `ece_before` and `ece_after` are expected calibration errors over `bins`,
    which hold equally many examples each; `raw_bins` are those without the temperature. `target` is the one of
    `promises` that applies unless the server is given another.
    """

    source: str = ""
    examples: Annotated[int, Field(gt=0)]
    right: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)]
    ece_before: Share
    ece_after: Share
    target: Target = DEFAULT_TARGET
    promises: tuple[Promise, ...]
    bins: tuple[Bin, ...] = ()
    raw_bins: tuple[Bin, ...] = ()

    @model_validator(mode="after")
    def _target_is_recorded(self) -> "Calibration":
        targets = [promise.target for promise in self.promises]
        if self.target not in targets:
            raise ValueError(f"calibration.target {self.target:g} is none of its promises' targets: {targets}")
        if len(set(targets)) < len(targets):
            raise ValueError(f"calibration.promises must have different targets, got {targets}")
        return self

    def promise(self, target: float | None = None) -> Promise | None:
        """The promise for `target` (None: the model's own); None if it is not recorded."""
        wanted = self.target if target is None else target
        return next((promise for promise in self.promises if promise.target == wanted), None)
