"""Figures of a run: each arm at each concurrency, arms compared in pairs, cost, and warnings.

Pure functions of the recorded samples: the same file gives the same figures.

    TTFT  first text chunk - scheduled send
    TPOT  (finish - first text chunk) / (completion tokens - 1), for answers of two tokens or more
    E2E   finish - scheduled send
    rates whole answers (or their tokens) / (last finish - first scheduled send)
"""

from collections.abc import Iterator, Sequence
from datetime import date

from benchmarks.cost import Assumptions, Bill, RequestTokens, make_bill
from benchmarks.record import Arm, BenchRun, Level, RequestSample
from models.common.record import Record
from models.common.stats import NEEDED, percentile, quantile, wilson

from .arms import BASE, FINE_TUNE, HOSTED
from .scoring import Predictions, compare, score_writing

# A 1-minute load average per core above which the machine counts as busy.
LOAD_PER_CORE = 0.25
# The share of cached tokens above which a short prompt counts as one that the server had seen.
REUSED_SHARE = 0.5
SHORT_PROMPT_TOKENS = 600
# What the server computes again of a prompt that it knows.
LEFT_TOKENS = 2
# With fewer tokens of their own, different prompts may share half of them.
OWN_TOKENS = 32


class Spread(Record):
    """A latency in milliseconds over `n` answers. A percentile is None when `n` is too small (stats.NEEDED)."""

    n: int
    p50_ms: float | None
    p50_low_ms: float | None
    p50_high_ms: float | None
    p90_ms: float | None
    p90_low_ms: float | None
    p90_high_ms: float | None


class LevelFigures(Record):
    """One arm at one concurrency. Rates count whole answers only; `errors` counts the others."""

    concurrency: int
    requests: int
    errors: int
    wall_s: float
    requests_per_s: float
    prompt_tokens_per_s: float | None
    completion_tokens_per_s: float | None
    cached_share: float | None
    ttft: Spread | None
    tpot: Spread | None
    e2e: Spread


class ArmAccuracy(Record):
    """Exactly right answers among all requests (a failed one is wrong), with Wilson's 95 % interval."""

    correct: int
    total: int
    share: float
    low: float
    high: float


class ArmFigures(Record):
    """One arm over all its levels. `accuracy` is None when the arm does not measure it.

    `chrf` takes its place where texts were written: the mean over all requests, a failed one counts 0.
    """

    name: str
    kind: str
    accuracy: ArmAccuracy | None
    chrf: float | None = None
    mean_prompt_tokens: float | None
    mean_completion_tokens: float | None
    levels: tuple[LevelFigures, ...]


class PairedComparison(Record):
    """Accuracy of `first` minus `second` on the same examples: Newcombe's interval, exact McNemar p-value."""

    first: str
    second: str
    both: int
    only_first: int
    only_second: int
    neither: int
    difference: float
    low: float
    high: float
    p_value: float


class Statistics(Record):
    """All figures of a run."""

    arms: tuple[ArmFigures, ...]
    comparisons: tuple[PairedComparison, ...]


def derive(run: BenchRun, assumptions: Assumptions) -> tuple[BenchRun, Statistics, Bill | None]:
    """Fill in the run's statistics, bill and warnings from its samples; also return statistics and bill."""
    statistics = summarise(run)
    bill = _bill(run, statistics, assumptions)
    derived = {
        "statistics": statistics.model_dump(mode="json"),
        "cost": bill.model_dump(mode="json") if bill else None,
        "warnings": warnings(run),
    }
    return run.model_copy(update=derived), statistics, bill


def summarise(run: BenchRun) -> Statistics:
    """Compute every figure of the run from its samples."""
    labelled = bool(run.workload.labels)
    judged = [arm for arm in run.arms if labelled and arm.measures_accuracy and samples_of(arm)]
    pairs = [(first, second) for i, first in enumerate(judged) for second in judged[i + 1 :]]
    return Statistics(
        arms=tuple(_arm(arm, labelled=labelled) for arm in run.arms),
        comparisons=tuple(_comparison(first, second) for first, second in pairs),
    )


def samples_of(arm: Arm) -> list[RequestSample]:
    """The arm's samples over all levels, without the warm-up."""
    return [sample for level in arm.levels for sample in level.samples]


def predictions_of(arm: Arm) -> Predictions:
    """`{id: (label, prediction)}`; a failed request predicts the empty text."""
    return {s.id: (s.label, "" if s.error else s.text.strip()) for s in samples_of(arm)}


def warnings(run: BenchRun) -> tuple[str, ...]:
    """Reasons to doubt the run: a busy machine, errors, too few requests, prompts that the server had seen before."""
    return (*_busy_warning(run), *(warning for arm in run.arms for warning in _arm_warnings(arm)))


def tpot_ms(sample: RequestSample) -> float | None:
    """Milliseconds per output token after the first; None for answers of fewer than two tokens."""
    if not sample.deltas_s or sample.completion_tokens is None or sample.completion_tokens < 2:
        return None
    return 1000 * (sample.finished_s - sample.deltas_s[0]) / (sample.completion_tokens - 1)


def spread(values_ms: Sequence[float]) -> Spread:
    """p50 and p90 of `values_ms` with their rank intervals."""
    p50, p90 = percentile(values_ms, 50), percentile(values_ms, 90)
    return Spread(
        n=len(values_ms),
        p50_ms=p50.estimate if p50 else (quantile(values_ms, 0.5) if values_ms else None),
        p50_low_ms=p50.low if p50 else None,
        p50_high_ms=p50.high if p50 else None,
        p90_ms=p90.estimate if p90 else None,
        p90_low_ms=p90.low if p90 else None,
        p90_high_ms=p90.high if p90 else None,
    )


def _arm(arm: Arm, *, labelled: bool) -> ArmFigures:
    samples = samples_of(arm)
    judged = arm.measures_accuracy and bool(samples)
    whole = [sample for sample in samples if sample.error is None]
    return ArmFigures(
        name=arm.name,
        kind=arm.kind,
        accuracy=_accuracy(arm) if judged and labelled else None,
        chrf=score_writing(predictions_of(arm)).chrf.estimate if judged and not labelled else None,
        mean_prompt_tokens=_mean([s.prompt_tokens for s in whole]),
        mean_completion_tokens=_mean([s.completion_tokens for s in whole]),
        levels=tuple(_level(level, arm.streams) for level in arm.levels),
    )


def _accuracy(arm: Arm) -> ArmAccuracy:
    predictions = predictions_of(arm)
    correct = sum(label == prediction for label, prediction in predictions.values())
    interval = wilson(correct, len(predictions))
    return ArmAccuracy(
        correct=correct, total=len(predictions), share=interval.estimate, low=interval.low, high=interval.high
    )


def _level(level: Level, streams: bool) -> LevelFigures:
    whole = [sample for sample in level.samples if sample.error is None]
    wall_s = _wall_s(level.samples)
    prompt = _total([s.prompt_tokens for s in whole])
    completion = _total([s.completion_tokens for s in whole])
    cached = _total([s.cached_tokens for s in whole])
    return LevelFigures(
        concurrency=level.concurrency,
        requests=len(level.samples),
        errors=len(level.samples) - len(whole),
        wall_s=wall_s,
        requests_per_s=len(whole) / wall_s if wall_s else 0.0,
        prompt_tokens_per_s=prompt / wall_s if prompt is not None and wall_s else None,
        completion_tokens_per_s=completion / wall_s if completion is not None and wall_s else None,
        cached_share=cached / prompt if cached is not None and prompt else None,
        ttft=spread([1000 * (s.deltas_s[0] - s.scheduled_s) for s in whole if s.deltas_s]) if streams else None,
        tpot=spread([ms for s in whole if (ms := tpot_ms(s)) is not None]) if streams else None,
        e2e=spread([1000 * (s.finished_s - s.scheduled_s) for s in whole]),
    )


def _wall_s(samples: Sequence[RequestSample]) -> float:
    if not samples:
        return 0.0
    return max(s.finished_s for s in samples) - min(s.scheduled_s for s in samples)


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _mean(values: Sequence[int | None]) -> float | None:
    total = _total(values)
    return None if total is None else total / len(values)


def _comparison(first: Arm, second: Arm) -> PairedComparison:
    paired = compare(predictions_of(first), predictions_of(second))
    return PairedComparison(
        first=first.name,
        second=second.name,
        both=paired.both,
        only_first=paired.only_first,
        only_second=paired.only_second,
        neither=paired.neither,
        difference=paired.difference.estimate,
        low=paired.difference.low,
        high=paired.difference.high,
        p_value=paired.p_value,
    )


def _bill(run: BenchRun, statistics: Statistics, assumptions: Assumptions) -> Bill | None:
    """The bill; None without a measured fine-tune or without an arm that counted the few-shot prompt's tokens."""
    pairs = list(zip(run.arms, statistics.arms, strict=True))
    rates = [level.requests_per_s for arm, figures in pairs if arm.name == FINE_TUNE for level in figures.levels]
    counted = [(arm, f) for arm, f in pairs if arm.name in {HOSTED, BASE} and f.mean_prompt_tokens is not None]
    if not counted or not rates or max(rates) == 0:
        return None
    # A measured hosted arm counts tokens with the tokenizer that is billed; the local base is the next best.
    arm, figures = min(counted, key=lambda pair: pair[0].name != HOSTED)
    prompt = figures.mean_prompt_tokens or 0.0
    tokens = RequestTokens(
        prompt=prompt, shared=arm.shared_share * prompt, completion=figures.mean_completion_tokens or 0.0
    )
    source = f"{arm.model}'s tokenizer (the shared part by its share of characters)"
    return make_bill(tokens, source, 1 / max(rates), assumptions, date.fromisoformat(run.started_at[:10]))


def _busy_warning(run: BenchRun) -> Iterator[str]:
    """Judge by the first level: later load averages include the benchmark itself."""
    levels = [level for arm in run.arms for level in arm.levels]
    cores = run.machine.logical_cores
    if levels and levels[0].load_before is not None and levels[0].load_before > LOAD_PER_CORE * cores:
        yield (
            f"the machine was busy before the run (load average {levels[0].load_before:.1f} on {cores} cores): "
            "times are too long, read ratios"
        )


def _arm_warnings(arm: Arm) -> Iterator[str]:
    for level in arm.levels:
        where = f"{arm.name} at {level.concurrency}"
        if failed := [sample.error for sample in level.samples if sample.error]:
            yield f"{where}: {len(failed)} of {len(level.samples)} requests failed, the first with: {failed[0]}"
        if arm.max_tokens and (n_cut := sum((s.completion_tokens or 0) >= arm.max_tokens for s in level.samples)):
            yield f"{where}: {n_cut} answers were cut at {arm.max_tokens} tokens; --max-tokens allows more"
        if len(level.samples) < NEEDED[90]:
            yield f"{where}: {len(level.samples)} requests are too few for a p90 (needs {NEEDED[90]})"
        if _seen_before(arm, level):
            yield f"{where}: the server knew most of each prompt already; was it asked the same texts before?"


def _seen_before(arm: Arm, level: Level) -> bool:
    """True if most prompts were cached beyond what all of them begin with: the template, and the words before a text.

    A prompt asked again is cached but for its last tokens. Short texts that begin alike are not taken for the same.
    """
    pairs = [(s.prompt_tokens or 0, s.cached_tokens) for s in level.samples if s.error is None and s.prompt_tokens]
    known = [(prompt, cached) for prompt, cached in pairs if cached is not None]
    if not known or sum(prompt for prompt, _ in known) > SHORT_PROMPT_TOKENS * len(known):
        return False
    shared = min(cached for _, cached in known)

    def is_reused(prompt: int, cached: int) -> bool:
        own = prompt - shared
        return prompt - cached <= LEFT_TOKENS or (own >= OWN_TOKENS and cached - shared > REUSED_SHARE * own)

    return sum(is_reused(*one) for one in known) > len(known) / 2
