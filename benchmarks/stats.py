"""Pure statistics of what was timed: quantiles with rank intervals.

No clock, no file, no random state of its own. Everything is 95 % unless said otherwise.
"""

import math
from collections.abc import Sequence

from models.stats import CONFIDENCE, Interval

# Requests below which a percentile is not reported: with fewer, the largest value seen lies under the true percentile
# with more than about 0.12 % probability (p**n).
NEEDED = {50: 6, 90: 64, 99: 662}


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) of `values`, linear between order statistics (Hyndman and Fan's type 7)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentile(values: Sequence[float], percent: int) -> Interval | None:
    """A percentile with its distribution-free interval; None when there are too few values (see NEEDED).

    The interval lies between two order statistics: how many of n values fall under the true quantile is binomial(n, q).
    """
    if len(values) < NEEDED[percent]:
        return None
    q = percent / 100
    low, high = quantile_ranks(len(values), q)
    ordered = sorted(values)
    return Interval(quantile(ordered, q), ordered[low], ordered[high])


def quantile_ranks(n: int, q: float, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """0-based ranks of the order statistics around the q-quantile that hold it with `confidence` or more.

    Clipped to the sample: with few values the upper rank of a high quantile is the largest value.
    """
    tail = (1 - confidence) / 2
    cumulative = 0.0
    low, high = 0, n - 1
    for k in range(n + 1):
        cumulative += math.comb(n, k) * q**k * (1 - q) ** (n - k)
        if cumulative <= tail:
            low = k
        if cumulative >= 1 - tail:
            high = min(k, n - 1)
            break
    return low, high
