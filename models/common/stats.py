"""Pure statistics: intervals of proportions, bootstrap of a mean, paired comparisons of answerers on the same items.

Conversion and benchmarks both compute their figures here. Confidence is 95 % by default.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence limits, in the unit of the estimate."""

    estimate: float
    low: float
    high: float


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927; Newcombe 1998, method 3)."""
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"expected 0 <= successes <= total and total > 0, got {successes} of {total}")
    z = _z(confidence)
    p = successes / total
    centre = p + z * z / (2 * total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == total else (centre + half) / scale
    return Interval(p, low, high)


def clopper_pearson_low(successes: int, total: int, confidence: float = CONFIDENCE) -> float:
    """The lower limit of the exact interval for a proportion (Clopper and Pearson 1934).

    The interval is two-sided, so the limit is too high with a probability of (1 - `confidence`) / 2 at most. It is the
    p at which as many successes or more have that probability, and this tail of the binomial is the incomplete beta
    function I_p(successes, total - successes + 1).
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"expected 0 <= successes <= total and total > 0, got {successes} of {total}")
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if proves_share(successes, total, middle, confidence) else (low, middle)
    return low


def proves_share(successes: int, total: int, share: float, confidence: float = CONFIDENCE) -> bool:
    """True if the exact lower limit is at least `share`: at that share, so many successes would be too rare."""
    return successes > 0 and incomplete_beta(share, successes, total - successes + 1) <= (1 - confidence) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) for a, b > 0, by its continued fraction (DLMF 8.17.22)."""
    if not 0 < x < 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):  # where the fraction of the mirrored function converges faster
        return 1 - incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _beta_fraction(x, a, b)


# Lentz's algorithm divides by these denominators; none may be zero.
_TINY = 1e-300


def _beta_fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + …)), by the modified Lentz algorithm."""
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1, 10_000):
        m = step // 2
        if step % 2:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + numerator * d or _TINY)
        c = 1 + numerator / c or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value from the discordant pairs: binomial(n, 1/2), the smaller tail doubled."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def newcombe_paired(both: int, only_first: int, only_second: int, neither: int) -> Interval:
    """Interval for the difference of two paired proportions, first minus second (Newcombe 1998b, method 10)."""
    n = both + only_first + only_second + neither
    first = wilson(both + only_first, n)
    second = wilson(both + only_second, n)
    phi = _phi(both, only_first, only_second, neither)
    down1, up1 = first.estimate - first.low, first.high - first.estimate
    down2, up2 = second.estimate - second.low, second.high - second.estimate
    difference = (only_first - only_second) / n
    low = math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    high = math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return Interval(difference, max(-1.0, difference - low), min(1.0, difference + high))


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's continuity-corrected correlation of the pairs; 0 when a margin is empty."""
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - only_first * only_second
    corrected = cross if cross < 0 else max(0.0, cross - n / 2)
    return corrected / math.sqrt(margins)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two answerers on the same items: the 2x2 table, the exact p-value, and the difference first minus second."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    difference: Interval


def compare_paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare right and wrong answers item by item; both sequences are in the same order of items."""
    pairs = list(zip(first, second, strict=True))
    both, only_first = pairs.count((True, True)), pairs.count((True, False))
    only_second, neither = pairs.count((False, True)), pairs.count((False, False))
    return Paired(
        both=both,
        only_first=only_first,
        only_second=only_second,
        neither=neither,
        p_value=mcnemar_exact(only_first, only_second),
        difference=newcombe_paired(both, only_first, only_second, neither),
    )


def bootstrap_mean(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean with a percentile bootstrap over the items; of paired differences, too. Raises ValueError for none."""
    if not values:
        raise ValueError("the mean of no values is not defined")
    sample = np.array(values, dtype=float)
    draws = np.random.default_rng(seed).choice(sample, size=(resamples, len(sample))).mean(axis=1)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The ratio of two sums over the same items, with a percentile bootstrap over the items; 0/0 counts as 0.

    Raises ValueError for no items.
    """
    if not numerators:
        raise ValueError("the ratio over no items is not defined")
    pairs = np.array(list(zip(numerators, denominators, strict=True)), dtype=float)
    chosen = np.random.default_rng(seed).integers(len(pairs), size=(resamples, len(pairs)))
    sums = np.concatenate([pairs.sum(axis=0, keepdims=True), pairs[chosen].sum(axis=1)])
    ratios = np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)
    low, high = np.quantile(ratios[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(ratios[0]), float(low), float(high))


def sign_flip_p(differences: Sequence[float], *, resamples: int = 4999, seed: int = 0) -> float:
    """Two-sided p-value of paired differences: the share of random signs that give a sum as far from 0 as theirs.

    Of right and wrong answers (-1, 0, 1) it is an estimate of the exact McNemar test's.
    """
    sizes = np.abs(np.array(differences, dtype=float))
    rng = np.random.default_rng(seed)
    as_far = sum(
        abs(np.where(rng.random(len(sizes)) < 0.5, sizes, -sizes).sum()) >= abs(sum(differences)) - 1e-9
        for _ in range(resamples)
    )
    return float((1 + as_far) / (1 + resamples))


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
