"""The judgement on cases made so that the right ranking, and what can be known of it, is known."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.comparison.scoring import Predictions
from benchmarks.ways.judge import AskedTwice, detectable_share, holm, judge_ways, score_one
from models.common.stats import compare_paired, mcnemar_exact
from models.common.text_scores import rouge_l
from models.task.task import TaskSpec

LABELS = ("a", "b")
CLASSIFY = TaskSpec(kind="classify", labels=LABELS, scorer="accuracy")
N = 200


def answered(right: float, n: int = N, seed: int = 0) -> Predictions:
    """Answers of which this share, drawn by chance, is right."""
    hits = np.random.default_rng(seed).permutation(n) < round(right * n)
    return {str(i): (LABELS[i % 2], LABELS[i % 2] if hit else LABELS[1 - i % 2]) for i, hit in enumerate(hits)}


def test_ways_are_ranked_and_a_large_difference_is_real() -> None:
    judged = judge_ways(
        {"low": answered(0.5, seed=1), "high": answered(0.9), "middle": answered(0.7, seed=2)}, CLASSIFY
    )
    assert [way.name for way in judged.ways] == ["high", "middle", "low"]
    assert judged.best.name == "high"
    assert judged.measure == "accuracy"
    assert [way.beside.real for way in judged.ways if way.beside] == [True, True]
    middle = judged.ways[1].beside
    assert middle is not None
    paired = compare_paired(
        *[[a == b for a, b in answered(share, seed=seed).values()] for share, seed in ((0.7, 2), (0.9, 0))]
    )
    assert (middle.difference, middle.p_value) == (paired.difference, paired.p_value)
    assert middle.n_better == paired.only_first
    assert middle.n_worse == paired.only_second
    assert [one.name for one in judged.best.measures] == ["accuracy", "macro-F1"]


def test_a_tie_and_too_few_items_are_not_real() -> None:
    tie = judge_ways({"one": answered(0.8), "other": answered(0.8, seed=3)}, CLASSIFY).ways[1].beside
    assert tie is not None
    assert (tie.real, tie.difference.estimate) == (False, 0)
    few = judge_ways({"one": answered(0.9, 10), "other": answered(0.5, 10, seed=3)}, CLASSIFY).ways[1].beside
    assert few is not None
    assert not few.real
    assert few.difference.estimate == pytest.approx(-0.4)


def test_a_difference_that_the_same_model_shows_against_itself_is_not_real() -> None:
    answers = {"one": answered(0.9), "other": answered(0.75, seed=1)}
    apart = judge_ways(answers, CLASSIFY, ("one", answers["one"], answered(0.88))).ways[1].beside
    noisy = judge_ways(answers, CLASSIFY, ("one", answers["one"], answered(0.7)))
    beside = noisy.ways[1].beside
    assert apart is not None
    assert beside is not None
    assert (apart.real, beside.real, beside.corrected_p < 0.05) == (True, False, True)
    assert isinstance(noisy.twice, AskedTwice)
    assert noisy.twice.difference == pytest.approx(0.2)
    assert noisy.twice.n_changed == sum(answers["one"][i] != answered(0.7)[i] for i in answers["one"])


def test_a_way_that_answered_a_part_is_not_the_best() -> None:
    part = dict(list(answered(1.0).items())[:20])
    judged = judge_ways({"whole": answered(0.8), "part": part, "none": {}}, CLASSIFY)
    assert [way.name for way in judged.ways] == ["part", "whole"]
    assert judged.best.name == "whole"
    beside = judged.ways[0].beside
    assert beside is not None
    assert beside.n == 20
    with pytest.raises(ValueError, match="no way"):
        judge_ways({"none": {}}, CLASSIFY)


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    # One comparison of these is significant by itself, and not among five.
    answers = {"best": answered(0.9), "near": answered(0.83, seed=1)}
    alone = judge_ways(answers, CLASSIFY).ways[1].beside
    among = judge_ways(answers | {str(i): answered(0.89, seed=i) for i in range(2, 6)}, CLASSIFY)
    beside = next(way for way in among.ways if way.name == "near").beside
    assert alone is not None
    assert beside is not None
    assert alone.p_value == beside.p_value < 0.05 < beside.corrected_p
    assert (alone.real, beside.real) == (True, False)


@pytest.mark.parametrize(("discordant", "n"), [(0.1, 343), (0.25, 200)])
def test_the_detectable_difference_is_found_in_four_of_five_runs(discordant: float, n: int) -> None:
    difference = detectable_share(discordant, n)
    assert difference is not None
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    draws = np.random.default_rng(0).multinomial(n, shares, size=1500)
    found = np.mean([mcnemar_exact(int(first), int(second)) < 0.05 for first, second, _ in draws])
    # The exact test is a little stricter than the formula.
    assert 0.7 < found < 0.85


def test_where_ways_hardly_disagree_nothing_is_detectable() -> None:
    assert detectable_share(0.0, 343) is None
    assert detectable_share(0.005, 343) is None


def test_written_texts_are_compared_by_their_own_scores() -> None:
    spec = TaskSpec(kind="write", scorer="rouge-l")
    texts = [f"a tool for the web number {i}" for i in range(40)]
    good = {str(i): (text, text if i % 4 else "a tool") for i, text in enumerate(texts)}
    poor = {str(i): (text, "a tool") for i, text in enumerate(texts)}
    judged = judge_ways({"poor": poor, "good": good}, spec)
    assert [way.name for way in judged.ways] == ["good", "poor"]
    beside = judged.ways[1].beside
    assert beside is not None
    assert beside.real
    mean = sum(rouge_l(*pair) for pair in poor.values()) / 40 - sum(rouge_l(*pair) for pair in good.values()) / 40
    assert beside.difference.estimate == pytest.approx(mean)
    assert (beside.n_worse, beside.n_better) == (30, 0)
    assert beside.detectable is not None
    exact = judge_ways({"poor": poor, "good": good}, TaskSpec(kind="write", scorer="exact-match"))
    assert exact.measure == "exact"
    assert exact.best.measures[0].value.estimate == 30 / 40


def test_an_extraction_is_scored_field_by_field() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    spec = TaskSpec(kind="extract", schema=schema, scorer="field-f1")
    wanted = json.dumps({"a": 1, "b": 2})
    assert score_one(wanted, json.dumps({"b": 2, "a": 3}), spec) == 0.5
    assert score_one(wanted, "{", spec) == 0
    exact = spec.model_copy(update={"scorer": "exact-match"})
    assert score_one(wanted, '{"b":2,"a":1}', exact) == 1
    assert score_one(wanted, json.dumps({"a": 1}), exact) == 0
    judged = judge_ways({"x": {"1": (wanted, wanted), "2": (wanted, "{")}}, spec)
    assert [one.name for one in judged.best.measures] == ["field F1", "valid", "exact"]
    assert [one.value.estimate for one in judged.best.measures][1:] == [0.5, 0.5]


def test_without_a_second_asking_the_test_alone_decides() -> None:
    answers = {"one": answered(0.9), "other": answered(0.6, seed=1)}
    judged = judge_ways(answers, CLASSIFY)
    assert judged.twice is None
    assert replace(judged).ways[1].beside == judged.ways[1].beside
