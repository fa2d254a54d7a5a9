"""Multinomial logistic regression with an L2 penalty, by L-BFGS (Nocedal and Wright, algorithm 7.4), in numpy."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from .features import Floats

Ints = NDArray[np.int64]

# Inverse strength of the penalty, on rows of length 1. On mails with planted errors 10 finds fewer.
STRENGTH = 60.0
_STEPS = 60
_MEMORY = 8
_TOLERANCE = 1e-5


def fit(points: Floats, classes: Ints, n_classes: int, strength: float = STRENGTH) -> Floats:
    """Weights (dimensions + 1, classes); the last row is the intercept, which carries no penalty."""
    wanted = np.eye(n_classes, dtype=points.dtype)[classes]
    weights = np.zeros((points.shape[1] + 1, n_classes), points.dtype)
    loss, slope = _loss(weights, points, wanted, strength)
    past: deque[tuple[Floats, Floats, float]] = deque(maxlen=_MEMORY)
    for _ in range(_STEPS):
        direction = _direction(slope, past)
        descent = float((slope * direction).sum())
        step = 1.0
        while True:
            tried = weights - step * direction
            next_loss, next_slope = _loss(tried, points, wanted, strength)
            if next_loss <= loss - 1e-4 * step * descent or step < 1e-6:
                break
            step /= 2
        moved, bent = tried - weights, next_slope - slope
        if (curvature := float((moved * bent).sum())) > 1e-12:
            past.append((moved, bent, 1 / curvature))
        settled = abs(loss - next_loss) <= _TOLERANCE * abs(loss)
        weights, loss, slope = tried, next_loss, next_slope
        if settled:
            break
    return weights


def probabilities(weights: Floats, points: Floats) -> Floats:
    """The probability of each class, one row a point."""
    return _softmax(points @ weights[:-1] + weights[-1])[0]


def _loss(weights: Floats, points: Floats, wanted: Floats, strength: float) -> tuple[float, Floats]:
    chance, log_chance = _softmax(points @ weights[:-1] + weights[-1])
    loss = 0.5 * float((weights[:-1] ** 2).sum()) - strength * float((wanted * log_chance).sum())
    error = strength * (chance - wanted)
    return loss, np.vstack([points.T @ error + weights[:-1], error.sum(axis=0, keepdims=True)])


def _softmax(scores: Floats) -> tuple[Floats, Floats]:
    scores = scores - scores.max(axis=1, keepdims=True)
    logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return np.exp(logs), logs


def _direction(slope: Floats, past: "deque[tuple[Floats, Floats, float]]") -> Floats:
    """The slope times the inverse curvature that the last steps showed."""
    if not past:
        return slope / max(1.0, float(np.linalg.norm(slope)))
    direction = slope.copy()
    taken: list[float] = []
    for moved, bent, scale in reversed(past):
        taken.append(scale * float((moved * direction).sum()))
        direction -= taken[-1] * bent
    _, bent, scale = past[-1]
    direction /= scale * float((bent**2).sum())
    for (moved, bent, scale), amount in zip(past, reversed(taken), strict=True):
        direction += moved * (amount - scale * float((bent * direction).sum()))
    return direction
