"""Statistics against published values, and against what must hold for any numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.common.stats import (
    bootstrap_mean,
    bootstrap_ratio,
    clopper_pearson_low,
    compare_paired,
    incomplete_beta,
    mcnemar_exact,
    newcombe_paired,
    proves_share,
    sign_flip_p,
    wilson,
)

counts = st.integers(0, 60)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_intervals(successes: int, total: int, low: float, high: float) -> None:
    interval = wilson(successes, total)
    assert interval.estimate == successes / total
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:2635), table II, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404), ((18, 12, 2, 18), 0.0562, 0.3290), ((53, 0, 0, 1), -0.0729, 0.0729)],
)
def test_newcombe_equals_the_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    interval = newcombe_paired(*table)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(counts, counts, counts, counts)
def test_newcombe_holds_the_difference_and_mirrors(a: int, b: int, c: int, d: int) -> None:
    if a + b + c + d == 0:
        return
    interval, mirrored = newcombe_paired(a, b, c, d), newcombe_paired(a, c, b, d)
    assert -1 <= interval.low <= interval.estimate <= interval.high <= 1
    assert mirrored.low == pytest.approx(-interval.high)
    assert mirrored.high == pytest.approx(-interval.low)


def test_mcnemar_equals_the_binomial_by_hand() -> None:
    # Ten discordant pairs, one against nine: 2 * (C(10,0) + C(10,1)) / 2**10.
    assert mcnemar_exact(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar_exact(9, 1) == mcnemar_exact(1, 9)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 2000) == 0.0 or mcnemar_exact(0, 2000) < 1e-300


def test_paired_comparison_counts_the_table() -> None:
    paired = compare_paired([True, True, False, False, True], [True, False, True, False, False])
    assert (paired.both, paired.only_first, paired.only_second, paired.neither) == (1, 2, 1, 1)
    assert paired.difference.estimate == pytest.approx(0.2)
    assert paired.p_value == 1.0


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def test_the_bootstrap_of_a_mean_agrees_with_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = bootstrap_mean(list(values))
    half = 1.96 * values.std() / 20
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_mean(list(values)) == found, "the same values give the same interval"


def test_the_bootstrap_of_equal_values_has_no_width_and_of_none_is_refused() -> None:
    found = bootstrap_mean([0.25] * 5)
    assert (found.estimate, found.low, found.high) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_a_ratio_of_sums_weighs_items_by_their_size() -> None:
    found = bootstrap_ratio([1.0, 0.0, 6.0], [2.0, 2.0, 6.0])
    assert found.estimate == pytest.approx(7 / 10)
    assert found.low < found.estimate < found.high
    assert bootstrap_ratio([3.0] * 9, [4.0] * 9).low == bootstrap_ratio([3.0] * 9, [4.0] * 9).high == 0.75
    assert bootstrap_ratio([0.0], [0.0]).estimate == 0
    with pytest.raises(ValueError, match="no items"):
        bootstrap_ratio([], [])


def test_a_ratio_with_equal_denominators_is_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    ratio, mean = bootstrap_ratio(values, [1.0] * len(values)), bootstrap_mean(values)
    assert ratio.estimate == pytest.approx(mean.estimate)
    assert (ratio.low, ratio.high) == pytest.approx((mean.low, mean.high), abs=0.1)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (4, 4), (6, 0), (9, 2), (1, 12)])
def test_flipped_signs_of_right_and_wrong_give_mcnemars_p(lost: int, won: int) -> None:
    differences = [-1.0] * lost + [1.0] * won + [0.0] * 20
    assert sign_flip_p(differences) == pytest.approx(mcnemar_exact(lost, won), abs=0.02)
    assert sign_flip_p([-value for value in differences]) == sign_flip_p(differences)


@pytest.mark.parametrize(
    ("successes", "total", "low"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 5; and 0.025 ** (1 / n) where all succeed.
    [(81, 263, 0.2527), (15, 148, 0.0578), (0, 20, 0.0), (1, 29, 0.0009), (29, 29, 0.025 ** (1 / 29))],
)
def test_clopper_pearson_equals_the_published_limits(successes: int, total: int, low: float) -> None:
    assert clopper_pearson_low(successes, total) == pytest.approx(low, abs=5e-5)


@given(st.integers(1, 90), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_at_the_limit_so_many_successes_are_as_rare_as_said(total: int, share: float, confidence: float) -> None:
    successes = round(share * total)
    low = clopper_pearson_low(successes, total, confidence)
    if successes == 0:
        assert low == 0
        return
    p = Fraction(low)
    tail = sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(successes, total + 1))
    assert float(tail) == pytest.approx((1 - confidence) / 2, rel=1e-9)
    assert low <= successes / total
    assert proves_share(successes, total, low * 0.999, confidence)
    assert not proves_share(successes, total, low + (1 - low) * 0.001, confidence)


@given(st.floats(0.001, 0.999), st.floats(0.5, 300), st.floats(0.5, 300))
def test_the_incomplete_beta_function_mirrors_and_grows(x: float, a: float, b: float) -> None:
    value = incomplete_beta(x, a, b)
    assert 0 <= value <= 1 + 1e-12
    assert value == pytest.approx(1 - incomplete_beta(1 - x, b, a), abs=1e-10)
    assert incomplete_beta(min(0.9999, x * 1.01), a, b) >= value - 1e-12
    assert (incomplete_beta(0, a, b), incomplete_beta(1, a, b)) == (0, 1)


def test_clopper_pearson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="got 3 of 2"):
        clopper_pearson_low(3, 2)
