"""Quantiles against numpy's and published tables, and against what must hold for any numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.common.stats import NEEDED, percentile, quantile, quantile_ranks


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-6)


def test_quantile_ranks_are_the_binomial_tables() -> None:
    # Conover, Practical Nonparametric Statistics: the median of n = 10 lies between the 2nd and 9th value (97.9 %).
    assert quantile_ranks(10, 0.5) == (1, 8)
    assert quantile_ranks(6, 0.5) == (0, 5)


@given(st.integers(6, 300), st.sampled_from([0.5, 0.9]))
def test_quantile_ranks_cover_enough(n: int, q: float) -> None:
    low, high = quantile_ranks(n, q)
    inside = sum(math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(low + 1, high + 1))
    # The interval may be cut off at the largest value, and is then as good as the sample allows.
    assert inside >= 0.95 - 1e-9 or high == n - 1 or low == 0


def test_percentiles_are_withheld_below_the_needed_count() -> None:
    values = [float(i) for i in range(NEEDED[90])]
    assert percentile(values[:-1], 90) is None
    found = percentile(values, 90)
    assert found is not None
    assert found.low < found.estimate < found.high
    assert percentile(values[:5], 50) is None
