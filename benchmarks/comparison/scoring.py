"""Scores of a set of predictions, by the kind of task.

Labels: accuracy, per-class precision, recall and F1, macro-F1, the confusion matrix. An answer is right only
if, stripped, it equals the label. Answers that are no label have a column of their own, `(other)`, which shows how
often a classifier babbles.

Written texts: chrF (Popović 2015), the F-score of the n-grams of characters that answer and example share. It needs no
words, so it holds for every language; 1 is the same text, and what two texts of one style share without one meaning is
about 0.3.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.common.stats import Interval, Paired, bootstrap_mean, compare_paired, wilson

OTHER = "(other)"
Predictions = Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class ClassScore:
    """Support, precision, recall and F1 of one label; 0/0 counts as 0."""

    label: str
    support: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class ClassificationScore:
    """`confusion[i][j]`: items of `labels[i]` answered with `labels[j]`; the last column is OTHER."""

    labels: tuple[str, ...]
    total: int
    correct: int
    accuracy: Interval
    macro_f1: Interval
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class WritingScore:
    """`exact`: the share of texts that are the example's, character for character; `chrf`: the mean over the texts."""

    total: int
    correct: int
    exact: Interval
    chrf: Interval


def score_writing(predictions: Predictions, *, resamples: int = 2000, seed: int = 0) -> WritingScore:
    """Score `{id: (text, prediction)}`; the interval of chrF is a percentile bootstrap over the items."""
    pairs = [(text.strip(), answer.strip()) for text, answer in predictions.values()]
    correct = sum(text == answer for text, answer in pairs)
    values = [chrf(text, answer) for text, answer in pairs]
    interval = bootstrap_mean(values, resamples=resamples, seed=seed)
    return WritingScore(len(pairs), correct, wilson(correct, len(pairs)), interval)


def chrf(text: str, answer: str, *, longest: int = 6, beta: float = 2.0) -> float:
    """Compute chrF of `answer` and `text`, 0 … 1: means over n-grams of 1 … `longest` characters.

    White space is left out; recall counts `beta` times as much as precision.
    """
    wanted, given = "".join(text.split()), "".join(answer.split())
    precisions, recalls = [], []
    for n in range(1, longest + 1):
        of_text, of_answer = _grams(wanted, n), _grams(given, n)
        if not of_text and not of_answer:
            continue
        shared = (of_text & of_answer).total()
        precisions.append(shared / max(1, of_answer.total()))
        recalls.append(shared / max(1, of_text.total()))
    if not recalls:
        return float(wanted == given)
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def confusion_matrix(pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> np.ndarray:
    """Counts of shape (labels, labels + 1) from (label, prediction) pairs; the last column is OTHER."""
    index = {label: i for i, label in enumerate(labels)}
    codes = [index[label] * (len(labels) + 1) + index.get(answer.strip(), len(labels)) for label, answer in pairs]
    counts = np.bincount(np.array(codes, dtype=np.int64), minlength=len(labels) * (len(labels) + 1))
    return counts.reshape(len(labels), len(labels) + 1)


def macro_f1_interval(confusion: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Macro-F1 with a percentile bootstrap over the items; resampling the cells is equivalent."""
    total = int(confusion.sum())
    draws = np.random.default_rng(seed).multinomial(total, confusion.ravel() / total, size=resamples)
    _, _, f1 = _f1(draws.reshape(resamples, *confusion.shape))
    low, high = np.quantile(f1.mean(axis=-1), [0.025, 0.975])
    return Interval(float(_f1(confusion)[2].mean()), float(low), float(high))


def score(predictions: Predictions, labels: Sequence[str]) -> ClassificationScore:
    """Score `{id: (label, prediction)}`. Raises ValueError when an item's label is not in `labels`."""
    if unknown := {label for label, _ in predictions.values()} - set(labels):
        raise ValueError(f"items carry labels {sorted(unknown)} that are not among {sorted(labels)}")
    matrix = confusion_matrix(list(predictions.values()), labels)
    precision, recall, f1 = _f1(matrix)
    correct = int(np.trace(matrix[:, :-1]))
    total = int(matrix.sum())
    return ClassificationScore(
        labels=tuple(labels),
        total=total,
        correct=correct,
        accuracy=wilson(correct, total),
        macro_f1=macro_f1_interval(matrix),
        classes=tuple(
            ClassScore(label, int(matrix[i].sum()), float(precision[i]), float(recall[i]), float(f1[i]))
            for i, label in enumerate(labels)
        ),
        confusion=tuple(tuple(int(n) for n in row) for row in matrix),
    )


def compare(first: Predictions, second: Predictions) -> Paired:
    """Paired comparison of two sets of predictions on the items they share."""
    shared = sorted(first.keys() & second.keys())

    def right(predictions: Predictions) -> list[bool]:
        return [predictions[item][0] == predictions[item][1].strip() for item in shared]

    return compare_paired(right(first), right(second))


def _f1(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 per class, from counts of shape (..., labels, labels + 1)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    predicted = confusion[..., :-1].sum(axis=-2)
    actual = confusion.sum(axis=-1)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    return precision, recall, 2 * hits / np.maximum(predicted + actual, 1)
