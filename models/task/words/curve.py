"""A learning curve of the word model: what it knows after an eighth, a quarter, half and all of the train examples.

It needs seconds, and says two things before any training: what a model without language reaches on this task, and
whether more examples still help.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.common.stats import Interval, wilson

from .doubt import folds_of, word_points
from .logistic import fit, probabilities

SHARES = (0.125, 0.25, 0.5, 1.0)
FOLDS = 4
MAX_ROWS = 1600


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Rows that were learned from, and the accuracy on rows that were not, with its 95 % interval."""

    n_rows: int
    accuracy: Interval


def learning_curve(texts: Sequence[str], labels: Sequence[str]) -> tuple[CurvePoint, ...]:
    """Learn from shares of the rows, judge on the rest, in four folds; the first 1,600 rows are used."""
    texts, labels = texts[:MAX_ROWS], labels[:MAX_ROWS]
    names = sorted(set(labels))
    given = np.array([names.index(label) for label in labels], np.int64)
    points, folds = word_points(texts), folds_of(given, FOLDS)
    drawn = np.random.default_rng(0).permutation(len(texts))
    curve = []
    for share in SHARES:
        right = n_learned = 0
        for fold in range(FOLDS):
            rest = drawn[folds[drawn] != fold]
            learned = rest[: max(len(names), math.ceil(share * len(rest)))]
            held = folds == fold
            chance = probabilities(fit(points[learned], given[learned], len(names)), points[held])
            right += int((chance.argmax(axis=1) == given[held]).sum())
            n_learned += len(learned)
        curve.append(CurvePoint(round(n_learned / FOLDS), wilson(right, len(texts))))
    return tuple(curve)


def advice(curve: Sequence[CurvePoint]) -> str:
    """Read the last doubling: a sentence for the user."""
    half, whole = curve[-2].accuracy.estimate, curve[-1].accuracy.estimate
    gain = whole - half
    noise = (curve[-1].accuracy.high - curve[-1].accuracy.low) / 2
    last = f"the last doubling of the examples changed the word model's accuracy by {100 * gain:+.1f} points"
    if gain > noise:
        return f"{last}: more examples would help"
    if gain > noise / 2:
        return f"{last}: more examples would probably help"
    return f"{last}, within its noise: clearer labels may help more than more examples"
