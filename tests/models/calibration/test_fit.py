"""The fit on made data of which the truth is known: temperature found, error gone, promises kept by the bound alone."""

import math
import random
from statistics import fmean

import pytest

from models.calibration.fit import (
    GRID,
    Judged,
    LabelScores,
    ScoredExample,
    bins_of,
    calibrate,
    calibration_error,
    examples_needed,
    fit_temperature,
    judge,
    promise_for,
)
from models.common.stats import clopper_pearson_low, proves_share

LABELS = ("a", "b", "c")


def made(n: int, temperature: float, seed: int = 0) -> LabelScores:
    """Examples of which the log-probabilities are `temperature` times too far apart."""
    chance = random.Random(seed)
    examples = []
    for number in range(n):
        true = [chance.gauss(0, 2) for _ in LABELS]
        label = chance.choices(LABELS, [math.exp(value) for value in true])[0]
        examples.append(ScoredExample(id=str(number), label=label, logprobs=tuple(temperature * v for v in true)))
    return LabelScores(model="made", labels=LABELS, examples=tuple(examples))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_the_temperature_is_found_and_takes_the_error_away(temperature: float) -> None:
    scores = made(2000, temperature, seed=3)
    found = calibrate(scores)
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.ece_after < 0.03
    assert found.ece_after <= found.ece_before + 0.005
    assert (found.ece_before > 0.05) == (temperature != 1)


def test_a_temperature_changes_no_answer_and_the_right_labels_likelihood_is_highest_at_it() -> None:
    scores = made(300, 2.0)
    found = fit_temperature(scores)

    def loss(temperature: float) -> float:
        total = 0.0
        for one in scores.examples:
            row = [value / temperature for value in one.logprobs]
            total += math.log(sum(map(math.exp, row))) - row[LABELS.index(one.label)]
        return total

    assert loss(found) < min(loss(found * 1.05), loss(found / 1.05))
    assert [one.right for one in judge(scores, found)] == [one.right for one in judge(scores, 1.0)]


def test_impossible_labels_and_answers_that_are_all_right_are_no_trouble() -> None:
    rows = tuple(ScoredExample(id=str(n), label="a", logprobs=(-0.1, -math.inf, -3.0)) for n in range(40))
    found = calibrate(LabelScores(model="sure", labels=LABELS, examples=rows))
    assert math.isfinite(found.temperature)
    assert found.right == found.examples == 40


def test_bins_hold_equally_many_and_the_error_is_the_mean_gap() -> None:
    judged = [Judged(0.8, right=True)] * 25 + [Judged(0.6, right=False)] * 25
    bins = bins_of(judged)
    assert [one.total for one in bins] == [5] * 10
    assert calibration_error(bins) == pytest.approx((0.2 + 0.6) / 2)
    assert calibration_error(bins_of([Judged(1.0, right=True)] * 3)) == 0


def flat(n_right: int, n: int, confidence: float = 0.999) -> list[Judged]:
    return [Judged(confidence, right=place < n_right) for place in range(n)]


def test_a_threshold_needs_its_proof() -> None:
    needed = next(n for n in range(1, 1000) if proves_share(n, n, 0.97))
    assert promise_for(0.97, flat(needed, needed)).threshold is not None
    missed = promise_for(0.97, flat(needed - 1, needed - 1))
    assert missed.threshold is None
    assert missed.needed is not None
    assert missed.needed >= needed
    assert promise_for(0.97, flat(needed - 1, needed)).threshold is None


def test_the_search_ends_at_the_first_threshold_that_fails() -> None:
    """Below a band of wrong answers are enough right ones to prove the whole: it is not looked for there."""
    sure, wrong, many = flat(200, 200, 0.999), flat(0, 60, 0.93), flat(3000, 3000, 0.9)
    found = promise_for(0.97, [*sure, *wrong, *many])
    assert proves_share(3200, 3260, 0.97)
    assert found.automatic == 200
    assert found.threshold is not None
    assert 0.93 < found.threshold <= 0.999
    assert found.bound == pytest.approx(clopper_pearson_low(200, 200), abs=1e-4)


def test_the_order_of_the_tests_looks_at_no_right_label() -> None:
    """It depends on the confidences alone: with all answers wrong none passes, with all right all do."""
    confidences = [one.confidence for one in judge(made(600, 1.0), 1.0)]
    right = promise_for(0.9, [Judged(one, right=True) for one in confidences])
    wrong = promise_for(0.9, [Judged(one, right=False) for one in confidences])
    assert right.threshold == GRID[-1] or right.automatic == 600
    assert (wrong.threshold, wrong.needed) == (None, None)


def test_promises_hold_where_the_truth_is_known_and_would_not_without_a_bound() -> None:
    """Each answer is right with the probability of its confidence: the true accuracy from a threshold is its mean."""
    broken = unproved = 0
    population = [one.confidence for one in judge(made(4000, 1.0, seed=99), 1.0)]
    for seed in range(200):
        chance = random.Random(seed)
        judged = [Judged(c, right=chance.random() < c) for c in chance.sample(population, 150)]
        promise = promise_for(0.9, judged)
        if promise.threshold is not None:
            broken += fmean(c for c in population if c >= promise.threshold) < 0.9
        naive = [t for t in GRID if (a := [o.right for o in judged if o.confidence >= t]) and fmean(a) >= 0.9]
        unproved += bool(naive) and fmean(c for c in population if c >= min(naive)) < 0.9
    assert broken <= 200 * 0.05
    assert unproved > 200 * 0.2


def test_the_number_that_would_be_enough_is_enough() -> None:
    judged = flat(49, 50, 0.99)
    needed = examples_needed(0.95, judged)
    assert needed is not None
    wrong = 1.5 / 51
    assert proves_share(needed - math.ceil(wrong * needed), needed, 0.95)
    assert examples_needed(0.99, flat(40, 50)) is None
    assert examples_needed(0.99, flat(20, 20)) is not None, "all are right so far"


def test_the_target_that_applies_is_the_users_first() -> None:
    scores = made(50, 1.0)
    assert calibrate(scores).target == 0.97
    assert calibrate(scores, (0.9, 0.8)).target == 0.9
    found = calibrate(scores, (0.9, 0.8), 0.8)
    assert found.target == 0.8
    assert found.promise() == found.promise(0.8)
    assert found.promise(0.97) is None
