"""Judgement on ways by their answers: scores, and which differences are real. Pure.

Each way is compared with the best one, example by example: exact McNemar and Newcombe's interval where an answer is
right or wrong, a sign-flip test and a bootstrap of the mean difference where it has a score. As many ways are compared,
p-values are corrected by Holm's method. A difference counts as real if its corrected p-value is below 5 % and it is
larger than that of one model asked twice (A/A).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, pstdev

from benchmarks.comparison.scoring import ClassificationScore, Predictions
from benchmarks.comparison.task_scores import ExtractionScore, TaskScore, fields_of, score_task
from models.common.stats import Interval, bootstrap_mean, compare_paired, sign_flip_p
from models.common.text_scores import rouge_l
from models.task.task import AnswerScorer, TaskSpec

SIGNIFICANT = 0.05
POWER = 0.8
RIGHT_OR_WRONG: tuple[AnswerScorer, ...] = ("accuracy", "exact-match")


@dataclass(frozen=True, slots=True)
class WayMeasure:
    """A measure by its name, with its 95 % interval."""

    name: str
    value: Interval


@dataclass(frozen=True, slots=True)
class BesideBest:
    """A way beside the best one, on the examples that both answered.

    `difference`: its score minus the best one's. `n_better`, `n_worse`: examples on which it did better or worse.
    `detectable`: the smallest difference that as many examples show in four of five runs, where two ways disagree as
    often as these; None where they disagree on too few to show any.
    """

    n: int
    difference: Interval
    p_value: float
    corrected_p: float
    n_better: int
    n_worse: int
    detectable: float | None
    real: bool


@dataclass(frozen=True, slots=True)
class WayFigures:
    """The scores of a way, that of the task's scorer first. `beside` is None for the best way."""

    name: str
    n: int
    measures: tuple[WayMeasure, ...]
    beside: BesideBest | None


@dataclass(frozen=True, slots=True)
class AskedTwice:
    """A/A: one model asked the same twice. `n_changed` answers were others the second time."""

    way: str
    n: int
    n_changed: int
    difference: float
    p_value: float


@dataclass(frozen=True, slots=True)
class WayJudgement:
    """All ways, best first. `measure` is the one they are ranked by."""

    measure: str
    n: int
    ways: tuple[WayFigures, ...]
    twice: AskedTwice | None

    @property
    def best(self) -> WayFigures:
        """The way with the highest score."""
        return next(way for way in self.ways if way.beside is None)


def judge_ways(
    answers: Mapping[str, Predictions], spec: TaskSpec, twice: tuple[str, Predictions, Predictions] | None = None
) -> WayJudgement:
    """Judge `{way: {id: (expected, answer)}}`; `twice` is a way with its answers of both times.

    A way that answered fewer examples than others is not the best one, however it scored on them. Raises ValueError
    without a way that answered.
    """
    measures = {name: measures_of(score_task(given, spec), spec.scorer) for name, given in answers.items() if given}
    n = max((len(answers[name]) for name in measures), default=0)
    if not n:
        raise ValueError("no way has an answer")
    order = sorted(measures, key=lambda name: -measures[name][0].value.estimate)
    best = next(name for name in order if len(answers[name]) == n)
    repeat = None if twice is None else _asked_twice(*twice, spec)
    compared = {name: _Pairs.of(answers[name], answers[best], spec) for name in order if name != best}
    raw = {name: pairs.p_value for name, pairs in compared.items()}
    corrected = holm(raw)
    floor = 0.0 if repeat is None else abs(repeat.difference)
    ways = [
        WayFigures(
            name,
            len(answers[name]),
            measures[name],
            None if name == best else compared[name].beside(corrected[name], floor),
        )
        for name in order
    ]
    return WayJudgement(measures[best][0].name, n, tuple(ways), repeat)


def measures_of(score: TaskScore, scorer: AnswerScorer) -> tuple[WayMeasure, ...]:
    """The measures of a score, that of the task's scorer first."""
    if isinstance(score, ClassificationScore):
        return WayMeasure("accuracy", score.accuracy), WayMeasure("macro-F1", score.macro_f1)
    exact = WayMeasure("exact", score.exact)
    if isinstance(score, ExtractionScore):
        found = [WayMeasure("field F1", score.field_f1), exact, WayMeasure("valid", score.valid)]
    else:
        found = [WayMeasure("ROUGE-L", score.rouge_l), exact]
    return tuple(sorted(found, key=lambda one: (one.name == "exact") != (scorer == "exact-match")))


def score_one(expected: str, answer: str, spec: TaskSpec) -> float:
    """The score of one answer by the task's scorer, 0 … 1; of an extraction the F1 of its own fields."""
    expected, answer = expected.strip(), answer.strip()
    if spec.kind == "extract":
        wanted, given = fields_of(expected) or set(), fields_of(answer)
        if spec.scorer == "exact-match":
            return float(given is not None and wanted == given)
        given = given or set()
        return 2 * len(wanted & given) / max(1, len(wanted) + len(given))
    return rouge_l(expected, answer) if spec.scorer == "rouge-l" else float(expected == answer)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for their number (Holm 1979)."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = highest
    return corrected


def detectable_share(discordant: float, n: int) -> float | None:
    """The smallest difference of two paired shares that McNemar's test shows with 80 % power (Connor 1987).

    `discordant`: the share of examples on which one is right and the other wrong. None if no difference is.
    """
    alpha, beta = NormalDist().inv_cdf(1 - SIGNIFICANT / 2), NormalDist().inv_cdf(POWER)

    def needed(difference: float) -> float:
        return ((alpha * math.sqrt(discordant) + beta * math.sqrt(discordant - difference**2)) / difference) ** 2

    if not discordant or needed(discordant) > n:
        return None
    low, high = 0.0, discordant
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= n else (middle, high)
    return high


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The scores of two ways on the examples that both answered."""

    first: Sequence[float]
    second: Sequence[float]
    binary: bool

    @classmethod
    def of(cls, first: Predictions, second: Predictions, spec: TaskSpec) -> "_Pairs":
        shared = sorted(first.keys() & second.keys())
        scores = [[score_one(*given[item], spec) for item in shared] for given in (first, second)]
        return cls(scores[0], scores[1], spec.scorer in RIGHT_OR_WRONG)

    @property
    def differences(self) -> list[float]:
        return [one - other for one, other in zip(self.first, self.second, strict=True)]

    @property
    def p_value(self) -> float:
        if not self.first:
            return 1.0
        if self.binary:
            return compare_paired([bool(one) for one in self.first], [bool(one) for one in self.second]).p_value
        return sign_flip_p(self.differences)

    @property
    def difference(self) -> Interval:
        if not self.first:
            return Interval(0.0, -1.0, 1.0)
        if self.binary:
            return compare_paired([bool(one) for one in self.first], [bool(one) for one in self.second]).difference
        return bootstrap_mean(self.differences)

    @property
    def detectable(self) -> float | None:
        n, differences = len(self.first), self.differences
        if n < 2:
            return None
        if self.binary:
            return detectable_share(sum(one != 0 for one in differences) / n, n)
        factor = NormalDist().inv_cdf(1 - SIGNIFICANT / 2) + NormalDist().inv_cdf(POWER)
        return factor * pstdev(differences) / math.sqrt(n) or None

    def beside(self, corrected_p: float, floor: float) -> BesideBest:
        found = self.difference
        return BesideBest(
            n=len(self.first),
            difference=found,
            p_value=self.p_value,
            corrected_p=corrected_p,
            n_better=sum(one > 0 for one in self.differences),
            n_worse=sum(one < 0 for one in self.differences),
            detectable=self.detectable,
            real=corrected_p < SIGNIFICANT and abs(found.estimate) > floor,
        )


def _asked_twice(way: str, first: Predictions, second: Predictions, spec: TaskSpec) -> AskedTwice | None:
    pairs = _Pairs.of(first, second, spec)
    shared = first.keys() & second.keys()
    if not shared:
        return None
    changed = sum(first[item][1] != second[item][1] for item in shared)
    return AskedTwice(way, len(shared), changed, pairs.difference.estimate, pairs.p_value)
