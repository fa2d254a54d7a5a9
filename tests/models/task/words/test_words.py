"""The word model is what it says: similarities, an optimum, doubts that find planted errors, a curve that rises."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from models.common.stats import wilson
from models.task.words.curve import CurvePoint, advice, learning_curve
from models.task.words.doubt import FOLDS, doubts, folds_of
from models.task.words.features import coordinates, gram, pieces, words, words_and_pairs
from models.task.words.lengths import LENGTHS, LabelledTexts, length_ladder, shortest
from models.task.words.logistic import STRENGTH, fit, probabilities
from tests.support.models.tasks import CLASSES, rows


def test_tokens() -> None:
    assert words("The mail, an É-mail 7 42") == ["the", "mail", "an", "mail", "42"]
    assert words_and_pairs("one two three") == ["one", "two", "three", "one two", "two three"]
    assert list(pieces("Ab c")) == [" ab", "ab ", " ab ", " c "]


def test_similarities_are_cosines_of_weighed_counts() -> None:
    texts = ["red red blue", "blue green", "green green green", "", "alone"]
    counts = [Counter(words(text)) for text in texts]
    spread = Counter(word for count in counts for word in count)

    def vector(count: Counter[str]) -> dict[str, float]:
        return {
            word: (1 + math.log(n)) * (1 + math.log((1 + len(texts)) / (1 + spread[word]))) for word, n in count.items()
        }

    def length(vector: dict[str, float]) -> float:
        return math.sqrt(sum(value**2 for value in vector.values())) or 1.0

    vectors = [vector(count) for count in counts]
    expected = [
        [sum(one[w] * other.get(w, 0) for w in one) / length(one) / length(other) for other in vectors]
        for one in vectors
    ]
    found = gram(texts, words)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    points = coordinates(found)
    np.testing.assert_allclose(points @ points.T, found, atol=1e-5)


def test_the_fit_is_an_optimum() -> None:
    chance = np.random.default_rng(0)
    points = chance.normal(size=(60, 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    classes = np.argmax(points[:, :3] + 0.3 * chance.normal(size=(60, 3)), axis=1)
    weights = fit(points, classes, 3)

    def loss(weights: np.ndarray) -> float:
        chances = probabilities(weights, points)[np.arange(60), classes]
        return float(0.5 * (weights[:-1] ** 2).sum() - STRENGTH * np.log(chances).sum())

    best = loss(weights)
    for _ in range(50):
        assert loss(weights + 0.1 * chance.normal(size=weights.shape)) > best
    np.testing.assert_allclose(probabilities(weights, points).sum(axis=1), 1)


def test_folds_hold_every_class_evenly() -> None:
    classes = np.array([0] * 37 + [1] * 12 + [2] * 3)
    folds = folds_of(classes, FOLDS)
    for one in range(3):
        counts = np.bincount(folds[classes == one], minlength=FOLDS)
        assert counts.max() - counts.min() <= 1


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], list[str], set[int]]:
    texts, labels = map(list, zip(*rows(150), strict=True))
    wrong = set(random.Random(1).sample(range(150), 8))
    for row in wrong:
        labels[row] = next(label for label in CLASSES if label != labels[row])
    return texts, labels, wrong


def test_planted_errors_come_first_with_the_right_label(planted: tuple[list[str], list[str], set[int]]) -> None:
    texts, labels, wrong = planted
    seen = []
    found = doubts(texts, labels, lambda done, total: seen.append((done, total)))
    assert set(found.ranked()[: len(wrong)]) == wrong
    right = [label for _, label in rows(150)]
    assert all(found.suggested[row] == right[row] for row in wrong)
    assert found.accuracy == pytest.approx(1 - len(wrong) / 150, abs=0.03)
    assert seen == [(n, FOLDS) for n in range(1, FOLDS + 1)]


def test_doubts_do_not_depend_on_the_order(planted: tuple[list[str], list[str], set[int]]) -> None:
    texts, labels, _ = planted
    order = random.Random(2).sample(range(150), 150)
    first, second = doubts(texts, labels), doubts([texts[row] for row in order], [labels[row] for row in order])
    np.testing.assert_allclose([first.confidence[row] for row in order], second.confidence, atol=1e-4)


def test_many_rows_are_judged_in_parts(
    planted: tuple[list[str], list[str], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, labels, wrong = planted
    monkeypatch.setattr("models.task.words.doubt.PART", 60)
    assert len(set(doubts(texts, labels).ranked()[:12]) & wrong) >= 6


def test_the_curve_rises_where_examples_help() -> None:
    texts, labels = zip(*rows(160), strict=True)
    curve = learning_curve(texts, labels)
    assert [point.n_rows for point in curve] == [15, 30, 60, 120]
    assert curve[0].accuracy.estimate < curve[-1].accuracy.estimate > 0.95


@pytest.mark.parametrize(
    ("half", "whole", "says"),
    [(500, 800, "more examples would help"), (780, 800, "would probably help"), (799, 800, "clearer labels")],
)
def test_the_advice_reads_the_last_doubling(half: int, whole: int, says: str) -> None:
    curve = [CurvePoint(n, wilson(right, 1000)) for n, right in ((1, 300), (2, half), (4, whole))]
    assert says in advice(curve)
    assert f"{(whole - half) / 10:+.1f} points" in advice(curve)


def told_at_word(place: int, n: int = 150) -> tuple[LabelledTexts, LabelledTexts]:
    """Train and validation texts of 300 words, of which the one at `place` tells the class."""
    chance = random.Random(1)
    texts = [[f"w{chance.randrange(50)}" for _ in range(300)] for _ in range(n)]
    labels = [list(CLASSES)[number % len(CLASSES)] for number in range(n)]
    for text, label in zip(texts, labels, strict=True):
        text[place] = CLASSES[label]
    whole = [" ".join(text) for text in texts]
    return LabelledTexts(whole[:100], labels[:100]), LabelledTexts(whole[100:], labels[100:])


@pytest.mark.parametrize(("place", "chosen"), [(10, 64), (100, 128), (280, None)])
def test_the_shortest_length_that_still_tells_the_class_is_chosen(place: int, chosen: int | None) -> None:
    train, validation = told_at_word(place)
    ladder = length_ladder(
        train,
        validation,
        lambda text, length: " ".join(text.split()[:length]),
        lambda text: len(text.split()),
        lambda done, total: None,
    )
    assert [point.max_tokens for point in ladder] == [*(one for one in LENGTHS if one < 300), None]
    assert shortest(ladder) == chosen
    assert [point.share_cut for point in ladder] == [1, 1, 1, 0]
    assert [point.mean_tokens for point in ladder] == [64, 128, 256, 300]
    assert ladder[-1].beside_whole.difference.estimate == 0


def test_a_length_that_cuts_nothing_is_no_choice() -> None:
    train, validation = (LabelledTexts(*zip(*rows(n, seed=n), strict=True)) for n in (60, 30))
    ladder = length_ladder(
        train, validation, lambda text, n: text, lambda text: len(text.split()), lambda done, total: None
    )
    assert [point.max_tokens for point in ladder] == [None]
    assert shortest(ladder) is None
