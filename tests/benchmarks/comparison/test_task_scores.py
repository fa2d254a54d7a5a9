"""Scores by the kind of a task, against figures worked out by hand."""

import json
from typing import Any

import pytest

from benchmarks.comparison.scoring import ClassificationScore
from benchmarks.comparison.task_scores import ExtractionScore, RougeScore, fields_of, score_task
from models.common.text_scores import rouge_l
from models.task.task import TaskSpec

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "lang": {"type": "string", "enum": ["c", "python"]},
        "uses": {"type": "array", "items": {"type": "string"}},
        "size": {"type": "number"},
    },
    "required": ["lang"],
    "additionalProperties": False,
}
EXTRACT = TaskSpec(kind="extract", schema=SCHEMA, scorer="field-f1")


def extraction(*pairs: tuple[Any, Any]) -> ExtractionScore:
    """The score of (expected, answer) pairs; an answer that is a text is sent as it is."""
    texts = [(json.dumps(one), other if isinstance(other, str) else json.dumps(other)) for one, other in pairs]
    found = score_task({str(number): pair for number, pair in enumerate(texts)}, EXTRACT)
    assert isinstance(found, ExtractionScore)
    return found


def test_fields_are_leaves_and_arrays_are_sets() -> None:
    assert fields_of('{"a": {"b": 1, "c": null}, "d": ["x", "y", "x"]}') == {
        (("a", "b"), "1"),
        (("a", "c"), "null"),
        (("d", "[]"), '"x"'),
        (("d", "[]"), '"y"'),
    }
    assert fields_of('{"d": [{"p": 1, "q": 2}]}') == fields_of('{"d": [{"q": 2.0, "p": 1.0}]}')
    assert fields_of('{"a": 1}') != fields_of('{"a": true}')
    assert fields_of('{"a": "1"}') != fields_of('{"a": 1}')
    assert (fields_of("{}"), fields_of("{"), fields_of("")) == (set(), None, None)


def test_micro_f1_counts_fields_and_not_answers() -> None:
    found = extraction(
        ({"lang": "c", "uses": ["x11", "gtk"]}, {"lang": "c", "uses": ["gtk", "x11"]}),  # 3 of 3, in another order
        ({"lang": "c", "size": 1}, {"lang": "python", "size": 1.0}),  # 1 of 2
        ({"lang": "c"}, {"lang": "c", "uses": ["gtk"]}),  # 1 of 1, and one too many
    )
    assert found.field_f1.estimate == pytest.approx(2 * (3 + 1 + 1) / ((3 + 3) + (2 + 2) + (1 + 2)))
    assert (found.correct, found.n_valid, found.total) == (1, 3, 3)
    assert found.exact.estimate == pytest.approx(1 / 3)
    assert found.field_f1.low < found.field_f1.estimate < found.field_f1.high


def test_what_leaves_the_schema_is_not_valid_and_what_is_no_json_has_no_fields() -> None:
    right = {"lang": "c"}
    found = extraction((right, {"lang": "cobol"}), (right, "{}"), (right, "lang: c"), (right, '{"lang": "c"'))
    assert (found.n_valid, found.valid.estimate, found.correct) == (0, 0, 0)
    assert found.field_f1.estimate == 0
    found = extraction((right, {"lang": "c", "more": 1}))
    assert (found.n_valid, found.correct) == (0, 0)
    assert found.field_f1.estimate == pytest.approx(2 / 3)


def test_texts_are_scored_by_rouge_l() -> None:
    pairs = {"1": ("mail client", "a mail client"), "2": ("editor", "editor "), "3": ("puzzle game", "shell")}
    found = score_task(pairs, TaskSpec(kind="write", scorer="rouge-l"))
    assert isinstance(found, RougeScore)
    assert found.rouge_l.estimate == pytest.approx((rouge_l("mail client", "a mail client") + 1 + 0) / 3)
    assert found.correct == 1
    assert found.exact.estimate == pytest.approx(1 / 3)
    assert found.rouge_l.low < found.rouge_l.estimate < found.rouge_l.high


def test_a_label_that_is_neither_expected_nor_answered_does_not_lower_the_mean() -> None:
    spec = TaskSpec(kind="classify", labels=("a", "b", "c", "d"), scorer="accuracy")
    found = score_task({"1": ("a", "a"), "2": ("b", "b"), "3": ("b", "c")}, spec)
    assert isinstance(found, ClassificationScore)
    assert found.labels == ("a", "b", "c")
    assert found.macro_f1.estimate == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found.accuracy.estimate == pytest.approx(2 / 3)
    babble = score_task({"1": ("a", "a or b"), "2": ("b", "b")}, spec)
    assert isinstance(babble, ClassificationScore)
    assert babble.confusion == ((0, 0, 1), (0, 1, 0))
