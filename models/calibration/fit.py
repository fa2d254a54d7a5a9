"""Fit of a model's confidence to held-out examples: temperature, calibration error, and thresholds that keep a promise.

A model's label log-probabilities tell which answer is likelier, but say 0.99 where 0.9 would be true. One number, the
temperature, divides them before they become probabilities (Guo et al. 2017, "On calibration of modern neural
networks"). No answer changes by it; the probability of the likeliest label becomes the share that is right.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from typing import Annotated

from pydantic import Field

from models.common.record import Record
from models.common.stats import clopper_pearson_low, proves_share

from .record import DEFAULT_TARGET, TARGETS, Bin, Calibration, Promise

N_BINS = 10
# Beyond these a temperature says that there are too few examples, not how sure the model is.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.2, 20.0
# A label this far below the likeliest has no say; -inf would end in NaN.
_FARTHEST = -60.0
# Thresholds that may be chosen, by the logit of the confidence: 0.9999 … 0.27. They are fixed before any example is
# seen. Half as far apart, they let 3 % of promises be broken instead of 2 % (email-triage, 1,500 random halves).
_LOGITS = tuple(step / 2 for step in range(18, -3, -1))
GRID = tuple(round(1 / (1 + math.exp(-logit)), 4) for logit in _LOGITS)
# The search begins at the lowest threshold with a test this likely to pass, beside the likeliest one.
_FIRST_CHANCE = 0.8
# Calibration examples beyond which no number is given.
_MOST_NEEDED = 1_000_000


class ScoredExample(Record):
    """A held-out example: the right label, and the log-probability of each label, in the order of `LabelScores`."""

    id: str
    split: str = ""
    label: str
    logprobs: tuple[float, ...]


class LabelScores(Record):
    """The label log-probabilities of one model on held-out examples."""

    model: str
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    examples: tuple[ScoredExample, ...]

    def dump(self) -> str:
        """The scores as JSON, a line for each example."""
        lines = (json.dumps(one.model_dump(), separators=(",", ":")) for one in self.examples)
        head = f'{{"model": {json.dumps(self.model)}, "labels": {json.dumps(self.labels)}, "examples": [\n'
        return head + ",\n".join(lines) + "\n]}\n"


@dataclass(frozen=True, slots=True)
class Judged:
    """An example's answer: the probability of the label given, and whether it is the right one."""

    confidence: float
    right: bool


def calibrate(
    scores: LabelScores, targets: Sequence[float] = TARGETS, target: float | None = None, source: str = ""
) -> Calibration:
    """Fit temperature and thresholds to all of `scores`. `target` applies by default: the usual one, or the first."""
    temperature = round(fit_temperature(scores), 4)
    raw, judged = judge(scores, 1.0), judge(scores, temperature)
    own = target if target is not None else DEFAULT_TARGET if DEFAULT_TARGET in targets else targets[0]
    return Calibration(
        source=source,
        examples=len(judged),
        right=sum(one.right for one in judged),
        temperature=temperature,
        ece_before=round(calibration_error(bins_of(raw)), 4),
        ece_after=round(calibration_error(bins_of(judged)), 4),
        target=own,
        promises=tuple(promise_for(one, judged) for one in targets),
        bins=tuple(bins_of(judged)),
        raw_bins=tuple(bins_of(raw)),
    )


def fit_temperature(scores: LabelScores) -> float:
    """The temperature that makes the right labels likeliest (least negative log-likelihood).

    With 1 / temperature = b, the derivative of an example's loss is the mean of the log-probabilities under their own
    distribution at b, less that of the right label. It grows with b, so its root is found by bisection.
    """
    rows = [(_below_best(one.logprobs), scores.labels.index(one.label)) for one in scores.examples]

    def slope(inverse: float) -> float:
        total = 0.0
        for row, right in rows:
            weights = [math.exp(inverse * value) for value in row]
            mean = math.fsum(map(mul, weights, row)) / math.fsum(weights)
            total += mean - row[right]
        return total

    low, high = 1 / _MOST_TEMPERATURE, 1 / _LEAST_TEMPERATURE
    for _ in range(25):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def judge(scores: LabelScores, temperature: float) -> list[Judged]:
    """The answer to each example, the likeliest label, with its probability at this temperature."""
    judged = []
    for one in scores.examples:
        weights = [math.exp(value / temperature) for value in _below_best(one.logprobs)]
        best = max(range(len(weights)), key=one.logprobs.__getitem__)
        judged.append(Judged(weights[best] / math.fsum(weights), scores.labels[best] == one.label))
    return judged


def _below_best(logprobs: Sequence[float]) -> list[float]:
    best = max(logprobs)
    return [max(value - best, _FARTHEST) for value in logprobs]


def bins_of(judged: Sequence[Judged], n_bins: int = N_BINS) -> list[Bin]:
    """The examples in the order of their confidence, in `n_bins` bins of equally many (at least one in each)."""
    ordered = sorted(judged, key=lambda one: one.confidence)
    n = min(n_bins, len(ordered))
    ends = [len(ordered) * place // n for place in range(n + 1)]
    return [
        Bin(
            confidence=round(math.fsum(one.confidence for one in ordered[start:end]) / (end - start), 4),
            right=sum(one.right for one in ordered[start:end]),
            total=end - start,
        )
        for start, end in pairwise(ends)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: by how much confidence and accuracy differ, over the bins, weighed by size."""
    total = sum(one.total for one in bins)
    return math.fsum(abs(one.confidence * one.total - one.right) for one in bins) / total


def promise_for(target: float, judged: Sequence[Judged]) -> Promise:
    """The lowest threshold from which accuracy is at least `target`, by the exact lower limit at 95 %.

    Thresholds are tested one after the other, the strictest first, and the search ends at the first that fails. Each
    test may err with 2.5 % (one side), and so may all together, without a correction for their number: to choose a
    threshold that breaks the promise, the first such one in the order must pass its test (fixed-sequence testing:
    Maurer, Hothorn and Lehmacher 1995; for a model's thresholds: Angelopoulos et al. 2021, "Learn then test",
    section 5). The order must not depend on which answers are right. It begins where the confidences alone foretell a
    proof: above that are too few answers, of which one that is wrong would end the search.

    The temperature is fitted to the same examples, but it is one number, and hardly changes the order of the answers.
    """
    kept: Promise | None = None
    for threshold in _in_order(target, judged):
        accepted = [one.right for one in judged if one.confidence >= threshold]
        if not proves_share(sum(accepted), len(accepted), target):
            break
        bound = clopper_pearson_low(sum(accepted), len(accepted))
        kept = Promise(
            target=target, threshold=threshold, automatic=len(accepted), right=sum(accepted), bound=round(bound, 4)
        )
    return kept or Promise(target=target, needed=examples_needed(target, judged))


def examples_needed(target: float, judged: Sequence[Judged]) -> int | None:
    """The estimated number of examples like these that would give a threshold; None: no number would.

    From each threshold the accuracy is estimated with half an error more than was seen, or as seen if that is too low.
    """
    return _needed(target, judged, 0.5) or _needed(target, judged, 0.0)


def _needed(target: float, judged: Sequence[Judged], more_errors: float) -> int | None:
    needed: list[int] = []
    for threshold in GRID:
        accepted = [one.right for one in judged if one.confidence >= threshold]
        wrong = (len(accepted) - sum(accepted) + more_errors) / (len(accepted) + 1)
        if not accepted or 1 - wrong <= target:
            continue
        if (n := _provable(target, wrong)) is not None:
            needed.append(math.ceil(n * len(judged) / len(accepted)))
    best = min(needed, default=None)
    return None if best is None or best > _MOST_NEEDED else max(best, len(judged) + 1)


def _provable(target: float, wrong: float) -> int | None:
    """The least number of answers, a share `wrong` of them wrong, that prove the target."""

    def proves(n: int) -> bool:
        return proves_share(n - math.ceil(wrong * n), n, target)

    high = 1
    while not proves(high):
        high *= 2
        if high > _MOST_NEEDED:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle, high)
    return high


def _in_order(target: float, judged: Sequence[Judged]) -> Iterator[float]:
    """The thresholds to test, in order: the first one, and those below it. Looks at no right label."""
    chances = [_chance(target, [one.confidence for one in judged if one.confidence >= level]) for level in GRID]
    if (best := max(chances)) > 0:
        first = max(place for place, chance in enumerate(chances) if chance >= _FIRST_CHANCE * best)
        yield from GRID[first:]


def _chance(target: float, confidences: Sequence[float]) -> float:
    """The probability that these answers prove the target if their confidences are true (errors: Poisson)."""
    n, mean = len(confidences), math.fsum(1 - one for one in confidences)
    chance, term, errors = 0.0, math.exp(-mean), 0
    while proves_share(n - errors, n, target):
        chance += term
        errors += 1
        term *= mean / errors
    return chance
