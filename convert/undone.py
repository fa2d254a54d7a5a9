"""A quantization that undoes the fine-tune: what comes out answers as the base does, not as the fine-tune.

It happens where a small change was merged onto weights that had been quantized before. They lie on a grid; the change
is smaller than a step of it, so rounding to the same grid takes it away whole. The weights hardly differ (1-2 %), so
only the answers tell: base, fine-tune and candidate are compared on the user's own examples.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from models.gguf.header import Header

# Kinds whose steps are so fine that a fine-tune survives being rounded to its base's grid (measured: Q8_0).
FINE_KINDS = frozenset({"F32", "F16", "BF16", "Q8_0"})


@dataclass(frozen=True)
class Nearness:
    """Where a candidate lies between base and fine-tune. KL divergences: means in nats over the same positions.

    `as_fine_tune` and `as_base` count, of the `differing` examples that base and fine-tune answer differently, those
    that the candidate answers as the one or the other; 0 where examples have no answers to compare.
    """

    kl_to_fine_tune: float
    kl_to_base: float
    as_fine_tune: int = 0
    as_base: int = 0
    differing: int = 0


def undone(nearness: Nearness, base_distance: float, noise: float) -> str | None:
    """Why the candidate counts as undoing the fine-tune; None if it does not.

    It does when its distributions or its answers lie nearer the base's. `base_distance` is the mean KL divergence from
    fine-tune to base and `noise` that of the fine-tune to itself in another batch shape: where the former does not
    exceed the latter there is no fine-tune to lose, and nothing is refused.
    """
    if base_distance <= noise:
        return None
    found = []
    if nearness.kl_to_base < nearness.kl_to_fine_tune:
        found.append(
            f"mean KL divergence {nearness.kl_to_fine_tune:.3g} to the fine-tune, {nearness.kl_to_base:.3g} to its base"
        )
    if nearness.as_base > nearness.as_fine_tune:
        found.append(
            f"of {nearness.differing} examples the two answer differently it answers {nearness.as_base} as the base, "
            f"{nearness.as_fine_tune} as the fine-tune"
        )
    return "; ".join(found) or None


def shared_grid(base: Header, candidate: Header, tuned: Collection[str]) -> Mapping[str, int]:
    """Of the `tuned` tensors, how many are quantized in `candidate` to the coarse kind they had in `base`, by kind."""
    kinds = (
        candidate.tensors[name].kind.name
        for name in tuned
        if name in base.tensors
        and name in candidate.tensors
        and candidate.tensors[name].kind == base.tensors[name].kind
    )
    return Counter(kind for kind in kinds if kind not in FINE_KINDS)


def cause(grid: Mapping[str, int], n_tuned: int) -> str:
    """The cause, in words, of a fine-tune that is undone or nearly so, where `shared_grid` is `grid`."""
    if not grid:
        return "quantizing it loses more than fine-tuning changed"
    return (
        f"{sum(grid.values())} of {n_tuned} fine-tuned matrices are rounded to the very grid their base lay on "
        f"({', '.join(sorted(grid))}), whose steps are larger than the fine-tune's change"
    )
