"""The choice: of the candidates measured, the fastest for the stated work that loses no more than the budget. Pure.

A candidate is judged against the F16 reference of the same conversion, which loses nothing by definition, and against
the model before its fine-tuning: a candidate that is nearer to that undoes the fine-tune.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from convert.errors import RequestInvalid
from convert.measure.compare import MeasuredLoss
from models.common.machine import mebibytes
from models.gguf.header import Header
from models.quality import Answers, Candidate, LossBudget, MeanScore

REFERENCE = "F16"
# Rates closer than this are a tie: on a machine in use the same file differs as much from round to round.
TIE = 0.03
SIGNIFICANT = 0.05
# Kinds with steps so fine that rounding to the base's grid does not undo a fine-tune (measured: Q8_0).
FINE_KINDS = frozenset({"F32", "F16", "BF16", "Q8_0"})


@dataclass(frozen=True)
class Selection:
    """`candidates` in the order given, each with its verdict and reason; `chosen` is the name of one of them.

    `reason` is the choice in one sentence. `overruled`: the user chose, not the budget.
    """

    candidates: tuple[Candidate, ...]
    chosen: str
    overruled: bool
    reason: str


def choose(
    candidates: Sequence[Candidate], budget: LossBudget, forced: str | None = None, *, noise: MeanScore | None = None
) -> Selection:
    """Judge `candidates`, one of which is the reference `F16`, and choose; `forced` (a name) overrules the budget.

    `noise`: the score of the reference's written answers beside its own at another batch size.
    Verdicts "failed" and "undoes the fine-tune" are final; all others are decided here. Without speeds the smallest
    counts as the fastest. Raises RequestInvalid if the forced candidate does not exist or failed.
    """
    reference = _find(REFERENCE, candidates)
    judged = [_judged(candidate, reference, budget, noise) for candidate in candidates]
    if forced is not None:
        chosen = _find(forced, judged)
        if chosen.verdict == "failed":
            raise RequestInvalid(f"{forced!r} was asked for, but it failed: {chosen.reason}")
        reason = f"asked for by name{_overruled_verdict(chosen)}"
    else:
        chosen = fastest([one for one in judged if one.verdict == "within budget"])
        reason = _reason(chosen, judged)
    marked = tuple(
        one.model_copy(update={"verdict": "chosen", "reason": reason}) if one is chosen else one for one in judged
    )
    return Selection(marked, chosen.name, forced is not None, reason)


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the most examples a second; among ties the smallest file, then the first name."""
    best = max(candidates, key=lambda candidate: candidate.score_per_s or 0.0)
    tied = [candidate for candidate in candidates if _ties(candidate, best)]
    return min(tied, key=lambda candidate: (candidate.size_bytes, candidate.name))


def budget_violations(
    candidate: Candidate, reference: Answers | None, budget: LossBudget, noise: MeanScore | None = None
) -> Iterator[str]:
    """Yield a phrase for each limit of the budget that `candidate` exceeds. `reference`: the reference's answers.

    Where answers have a score it is judged, and neither flips nor accuracy. `noise` as in `choose`.
    """
    if candidate.loss is None:
        yield "its loss was not measured"
    elif not candidate.loss.kl_mean <= budget.kl_mean:  # true for NaN, too
        yield f"mean KL divergence {candidate.loss.kl_mean:.3g}, the budget is {budget.kl_mean:g}"
    answers = candidate.answers
    if answers is None:
        return
    if answers.score is not None:
        yield from _score_violation(answers.score, noise)
        return
    if answers.flips > budget.flips * answers.total:
        share = answers.flips / answers.total
        yield f"{answers.flips} of {answers.total} answers changed ({share:.1%}), the budget is {budget.flips:.1%}"
    if reference is not None and answers.correct < reference.correct and answers.p_value < SIGNIFICANT:
        yield (
            f"{answers.correct} of {answers.total} answers are right, {reference.correct} were "
            f"(exact McNemar p = {answers.p_value:.2g})"
        )


def _score_violation(score: MeanScore, noise: MeanScore | None) -> Iterator[str]:
    """A score significantly below the reference's, by more than the reference differs from itself."""
    floor = abs(noise.difference) if noise is not None else 0.0
    if score.difference_high < 0 and score.difference < -floor:
        yield (
            f"mean {score.metric} {score.mean:.3f}, {REFERENCE}'s is {score.reference_mean:.3f} (difference "
            f"{score.difference:+.3f}, 95 % interval {score.difference_low:+.3f} to {score.difference_high:+.3f})"
        )


@dataclass(frozen=True)
class BaseDistances:
    """A candidate's distances to fine-tune and base: mean KL divergences in nats over the same positions.

    `differing` counts the examples that base and fine-tune answer differently; `as_fine_tune` and `as_base` those of
    them that the candidate answers like one or the other: with its label, or with a text more like its text. All three
    are 0 where examples have no answers to compare.
    """

    kl_to_fine_tune: float
    kl_to_base: float
    as_fine_tune: int = 0
    as_base: int = 0
    differing: int = 0


def base_distances(to_fine_tune: MeasuredLoss, to_base: MeasuredLoss) -> BaseDistances:
    """The distances from one candidate's comparisons with fine-tune and base, over the same examples."""
    pairs = [
        (one.likeness, other.likeness)
        for one, other in zip(to_fine_tune.examples, to_base.examples, strict=True)
        if one.reference_answer != other.reference_answer
    ]
    return BaseDistances(
        kl_to_fine_tune=to_fine_tune.loss.kl_mean if to_fine_tune.loss is not None else 0.0,
        kl_to_base=to_base.loss.kl_mean if to_base.loss is not None else 0.0,
        as_fine_tune=sum(tuned > base for tuned, base in pairs),
        as_base=sum(base > tuned for tuned, base in pairs),
        differing=len(pairs),
    )


def undo_reason(distances: BaseDistances, base_distance: float, noise: float) -> str | None:
    """The evidence that a candidate undoes the fine-tune; None if there is none.

    The evidence is that its distributions or its answers are nearer the base's. `base_distance` is the mean KL
    divergence from fine-tune to base, `noise` that of the fine-tune to itself at another batch size: if the former does
    not exceed the latter, there is no fine-tune to lose.
    """
    if base_distance <= noise:
        return None
    reasons = []
    if distances.kl_to_base < distances.kl_to_fine_tune:
        reasons.append(
            f"mean KL divergence {distances.kl_to_fine_tune:.3g} to the fine-tune, {distances.kl_to_base:.3g} to its "
            "base"
        )
    if distances.as_base > distances.as_fine_tune:
        reasons.append(
            f"of {distances.differing} examples the two answer differently it answers {distances.as_base} like the "
            f"base, {distances.as_fine_tune} like the fine-tune"
        )
    return "; ".join(reasons) or None


def shared_grid(base: Header, candidate: Header, tuned: Collection[str]) -> Mapping[str, int]:
    """Count, by kind, the `tuned` tensors that `candidate` quantizes to the same coarse kind as `base`."""
    kinds = (
        candidate.tensors[name].kind.name
        for name in tuned
        if name in base.tensors
        and name in candidate.tensors
        and candidate.tensors[name].kind == base.tensors[name].kind
    )
    return Counter(kind for kind in kinds if kind not in FINE_KINDS)


def undo_cause(grid: Mapping[str, int], n_tuned: int) -> str:
    """The cause, as a sentence, of a fine-tune that is undone or nearly so. `grid` is from `shared_grid`."""
    if not grid:
        return "quantizing it loses more than fine-tuning changed"
    return (
        f"{sum(grid.values())} of {n_tuned} fine-tuned matrices are rounded to the very grid their base lay on "
        f"({', '.join(sorted(grid))}), whose steps are larger than the fine-tune's change"
    )


def _judged(candidate: Candidate, reference: Candidate, budget: LossBudget, noise: MeanScore | None) -> Candidate:
    if candidate.verdict in {"failed", "undoes the fine-tune"}:
        return candidate
    if candidate.name == REFERENCE:
        return candidate.model_copy(update={"verdict": "within budget", "reason": "the reference"})
    over = "; ".join(budget_violations(candidate, reference.answers, budget, noise))
    if over and candidate.grid:  # part of the fine-tune is lost, if not all of it
        over = f"{over}. {candidate.grid}"
    verdict = "over budget" if over else "within budget"
    return candidate.model_copy(update={"verdict": verdict, "reason": over or "loses no more than the budget"})


def _ties(candidate: Candidate, best: Candidate) -> bool:
    """True if `best` may be faster by chance: the rates are close, or the ranges of their rounds overlap."""
    rate, best_rate = candidate.score_per_s or 0.0, best.score_per_s or 0.0
    return rate >= best_rate * (1 - TIE) or _rounds(candidate)[1] >= _rounds(best)[0]


def _rounds(candidate: Candidate) -> tuple[float, float]:
    """The slowest and the fastest round; without rounds, the rate."""
    samples = candidate.speed.score_samples_per_s if candidate.speed is not None else ()
    rate = candidate.score_per_s or 0.0
    return min(samples, default=rate), max(samples, default=rate)


def _reason(chosen: Candidate, judged: Sequence[Candidate]) -> str:
    if chosen.name == REFERENCE and not any(one.verdict == "within budget" for one in judged if one is not chosen):
        return "no quantization is within the budget, so the half-precision file stays"
    if chosen.score_per_s is None:
        return "the smallest within the budget; speed was not measured"
    best = max((one for one in judged if one.verdict == "within budget"), key=lambda one: one.score_per_s or 0.0)
    if best.score_per_s is None or best.score_per_s <= chosen.score_per_s:
        return f"the fastest within the budget: {_rate(chosen)} examples/s{_beside_smaller(chosen, judged)}"
    return (
        f"the smallest of the fastest within the budget: {_rate(chosen)} examples/s, which the rounds do not "
        f"tell from {best.name}'s {_rate(best)}"
    )


def _beside_smaller(chosen: Candidate, judged: Sequence[Candidate]) -> str:
    """The gain of the choice over the fastest of the smaller files within the budget, if there are any."""
    smaller = [one for one in judged if one.verdict == "within budget" and one.size_bytes < chosen.size_bytes]
    other = max(smaller, key=lambda one: one.score_per_s or 0.0, default=None)
    if other is None or not other.score_per_s or chosen.score_per_s is None:
        return ""
    sizes = f"{mebibytes(chosen.size_bytes)} to {mebibytes(other.size_bytes)}"
    return f", {chosen.score_per_s / other.score_per_s:.2f} times {other.name}'s {_rate(other)} (size: {sizes})"


def _rate(candidate: Candidate) -> str:
    low, high = _rounds(candidate)
    spread = f" ({low:.3g} to {high:.3g})" if low < high else ""
    return f"{candidate.score_per_s or 0.0:.3g}{spread}"


def _overruled_verdict(chosen: Candidate) -> str:
    if chosen.verdict == "within budget":
        return ""
    verb = "is " if chosen.verdict == "over budget" else ""
    return f", although it {verb}{chosen.verdict}: {chosen.reason}"


def _find(name: str, candidates: Sequence[Candidate]) -> Candidate:
    match = next((candidate for candidate in candidates if candidate.name == name), None)
    if match is None:
        known = ", ".join(candidate.name for candidate in candidates)
        raise RequestInvalid(f"no candidate {name!r} was made; there are {known or 'none'}")
    return match
