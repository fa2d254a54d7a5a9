"""Scores of predictions against figures worked out by hand."""

import numpy as np
import pytest

from benchmarks.comparison.scoring import (
    OTHER,
    chrf,
    compare,
    confusion_matrix,
    macro_f1_interval,
    score,
    score_writing,
)

PREDICTIONS = {
    "1": ("ham", "ham"),
    "2": ("ham", "ham "),
    "3": ("ham", "spam"),
    "4": ("spam", "spam"),
    "5": ("spam", "I think it is spam"),
}


def test_score_by_hand() -> None:
    found = score(PREDICTIONS, ["ham", "spam"])
    assert (found.correct, found.total) == (3, 5)
    assert found.confusion == ((2, 1, 0), (0, 1, 1))
    ham, spam = found.classes
    assert (ham.precision, ham.recall, ham.f1) == pytest.approx((1.0, 2 / 3, 0.8))
    assert (spam.precision, spam.recall, spam.f1) == pytest.approx((0.5, 0.5, 0.5))
    assert found.macro_f1.estimate == pytest.approx(0.65)
    assert found.macro_f1.low <= 0.65 <= found.macro_f1.high


def test_a_label_is_right_only_when_it_is_the_whole_answer() -> None:
    matrix = confusion_matrix([("ham", "ham or spam"), ("ham", "Ham"), ("ham", "")], ["ham", "spam"])
    assert matrix.tolist() == [[0, 0, 3], [0, 0, 0]]
    assert OTHER not in {"ham", "spam"}


def test_bootstrap_repeats_for_a_seed_and_shrinks_with_more_items() -> None:
    small = np.array([[8, 2, 0], [3, 7, 0]])
    assert macro_f1_interval(small, seed=1) == macro_f1_interval(small, seed=1)
    few, many = macro_f1_interval(small), macro_f1_interval(100 * small)
    assert few.estimate == pytest.approx(many.estimate)
    assert many.high - many.low < 0.3 * (few.high - few.low)


def test_compare_uses_the_shared_items_only() -> None:
    other = {"1": ("ham", "spam"), "4": ("spam", "spam"), "9": ("ham", "ham")}
    paired = compare(PREDICTIONS, other)
    assert (paired.both, paired.only_first, paired.only_second, paired.neither) == (1, 1, 0, 0)


def test_an_unknown_true_label_is_refused() -> None:
    with pytest.raises(ValueError, match="ilug"):
        score({"1": ("ilug", "ham")}, ["ham", "spam"])


def test_chrf_by_hand() -> None:
    assert chrf("a text", "a text") == 1.0
    assert chrf("abc", "xyz") == 0.0
    assert chrf("", "") == 1.0
    assert chrf("abc", "") == 0.0
    # "ab" beside "abc": precision (2/2 + 1/1 + 0) / 3, recall (2/3 + 1/2 + 0) / 3.
    precision, recall = 2 / 3, (2 / 3 + 1 / 2) / 3
    assert chrf("a b c", "ab") == pytest.approx(5 * precision * recall / (4 * precision + recall))


def test_written_texts_are_scored_by_nearness() -> None:
    found = score_writing({"1": ("Dear Anna, thank you.", "Dear Anna, thanks."), "2": ("Yes.", "Yes. ")})
    assert (found.correct, found.total) == (1, 2)
    assert found.chrf.low <= found.chrf.estimate <= found.chrf.high
    assert 0.7 < found.chrf.estimate < 1
