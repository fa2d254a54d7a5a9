"""Scores of a task's answers, by its kind, with 95 % intervals. Pure.

- classify: accuracy, macro-F1 and the figures of each label (`scoring`).
- extract: the share of answers that fit the task's schema, micro-F1 of their fields, and the share that is all right.
- write: ROUGE-L, and the share of texts that are the example's.

A field is a leaf of the answer: its path and its value. An array is the set of its elements, in any order; an element
that is an object or an array counts as one value.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from models.common.stats import Interval, bootstrap_mean, bootstrap_ratio, wilson
from models.common.text_scores import rouge_l
from models.task.schema import fault
from models.task.task import TaskSpec

from .scoring import ClassificationScore, Predictions, score

LeafField = tuple[tuple[str, ...], str]


@dataclass(frozen=True, slots=True)
class ExtractionScore:
    """`valid`: the share that fits the schema. `exact`: the share with the example's fields and no other."""

    total: int
    correct: int
    n_valid: int
    valid: Interval
    field_f1: Interval
    exact: Interval


@dataclass(frozen=True, slots=True)
class RougeScore:
    """`exact`: the share of texts that are the example's, character for character; `rouge_l`: the mean F1."""

    total: int
    correct: int
    rouge_l: Interval
    exact: Interval


TaskScore = ClassificationScore | ExtractionScore | RougeScore


def score_task(predictions: Predictions, spec: TaskSpec) -> TaskScore:
    """Score `{id: (expected, answer)}` by the kind of the task."""
    if spec.json_schema is not None:
        return score_extraction(predictions, spec.json_schema)
    if spec.kind == "write":
        return score_rouge(predictions)
    # A label that is neither expected nor answered has no F1 that a mean could hold.
    used = {text.strip() for pair in predictions.values() for text in pair}
    return score(predictions, [label for label in spec.labels if label in used])


def score_rouge(predictions: Predictions) -> RougeScore:
    """ROUGE-L with a bootstrap over the texts, exact match with Wilson's interval."""
    pairs = [(expected.strip(), answer.strip()) for expected, answer in predictions.values()]
    correct = sum(expected == answer for expected, answer in pairs)
    similar = bootstrap_mean([rouge_l(expected, answer) for expected, answer in pairs])
    return RougeScore(len(pairs), correct, similar, wilson(correct, len(pairs)))


def score_extraction(predictions: Predictions, schema: Mapping[str, Any]) -> ExtractionScore:
    """Score JSON answers: Wilson's interval for shares, a bootstrap over the answers for F1.

    The fields of an answer that is not JSON are none; those of one that only leaves the schema count.
    """
    shared, fields = [], []
    n_valid = correct = 0
    for expected, answer in predictions.values():
        wanted, given = fields_of(expected), fields_of(answer)
        n_valid += not fault(answer, dict(schema))
        correct += given is not None and wanted == given
        shared.append(2.0 * len((wanted or set()) & (given or set())))
        fields.append(float(len(wanted or ()) + len(given or ())))
    total = len(predictions)
    return ExtractionScore(
        total=total,
        correct=correct,
        n_valid=n_valid,
        valid=wilson(n_valid, total),
        field_f1=bootstrap_ratio(shared, fields),
        exact=wilson(correct, total),
    )


def fields_of(answer: str) -> set[LeafField] | None:
    """The leaf fields of a JSON answer; None if it is not JSON."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return set(_leaves((), value))


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[LeafField]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield (*path, "[]"), _spelled(inner)
    else:
        yield path, _spelled(value)


def _spelled(value: Any) -> str:
    """The value as text, the same for equal values: of numbers 1 and 1.0, of objects in any order of keys."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
