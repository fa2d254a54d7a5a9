"""The pick: of what was made and measured, the fastest for the stated work that loses no more than the budget. Pure.

A candidate is judged beside the half-precision reference of the same conversion, which loses nothing by definition.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from convert.errors import RequestInvalid
from models.gguf.header import Header
from models.quality import Answers, Budget, Candidate

REFERENCE = "F16"
# Rates closer than this are a tie: the same file differs by as much from round to round on a machine that is in use.
TIE = 0.03
# So are those closer than this, unless the faster one was the faster in every round.
UNSURE = 0.1
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Selection:
    """`candidates` in the order given, each with its verdict and the reason for it; `chosen` is one of their names.

    `reason` is the choice in one sentence.
    """

    candidates: tuple[Candidate, ...]
    chosen: str
    overruled: bool
    reason: str


def choose(candidates: Sequence[Candidate], budget: Budget, wanted: str | None = None) -> Selection:
    """Judge `candidates`, of which one is the reference `F16`, and pick one; `wanted` (a name) overrules the budget.

    Verdicts "failed" and "undoes the fine-tune" stand; everything else is judged here. Without speeds the smallest
    counts as the fastest. Raises RequestInvalid if `wanted` was not made, or failed.
    """
    reference = _named(REFERENCE, candidates)
    judged = [_judged(candidate, reference, budget) for candidate in candidates]
    if wanted is not None:
        picked = _named(wanted, judged)
        if picked.verdict == "failed":
            raise RequestInvalid(f"{wanted!r} was asked for, but it failed: {picked.reason}")
        reason = f"asked for by name{_against(picked)}"
    else:
        picked = fastest([one for one in judged if one.verdict == "within budget"])
        reason = _why(picked, judged)
    marked = tuple(
        one.model_copy(update={"verdict": "chosen", "reason": reason}) if one is picked else one for one in judged
    )
    return Selection(marked, picked.name, wanted is not None, reason)


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """The one with the most examples a second; of those that tie with it the smallest file, then the first name."""
    best = max(candidates, key=lambda candidate: candidate.score_per_s or 0.0)
    tied = [candidate for candidate in candidates if _ties(candidate, best)]
    return min(tied, key=lambda candidate: (candidate.size_bytes, candidate.name))


def _ties(candidate: Candidate, best: Candidate) -> bool:
    """Whether `best` may be the faster one by chance. The rounds were measured in turns, so they compare one by one."""
    its, bests = candidate.score_per_s or 0.0, best.score_per_s or 0.0
    if its >= bests * (1 - TIE) or candidate.speed is None or best.speed is None:
        return its >= bests * (1 - TIE)
    rounds = zip(candidate.speed.score_samples_per_s, best.speed.score_samples_per_s, strict=False)
    return its >= bests * (1 - UNSURE) and any(one >= other for one, other in rounds)


def budget_violations(candidate: Candidate, reference: Answers | None, budget: Budget) -> Iterator[str]:
    """What `candidate` loses beyond the budget, a phrase each. `reference`: the reference's own answers."""
    if candidate.loss is None:
        yield "its loss was not measured"
    elif not candidate.loss.kl_mean <= budget.kl_mean:  # a NaN is no loss within any budget
        yield f"mean KL divergence {candidate.loss.kl_mean:.3g}, the budget is {budget.kl_mean:g}"
    answers = candidate.answers
    if answers is None:
        return
    if answers.flips > budget.flips * answers.total:
        share = answers.flips / answers.total
        yield f"{answers.flips} of {answers.total} answers changed ({share:.1%}), the budget is {budget.flips:.1%}"
    if reference is not None and answers.correct < reference.correct and answers.p_value < SIGNIFICANT:
        yield (
            f"{answers.correct} of {answers.total} answers are right, {reference.correct} were "
            f"(exact McNemar p = {answers.p_value:.2g})"
        )


def _judged(candidate: Candidate, reference: Candidate, budget: Budget) -> Candidate:
    if candidate.verdict in {"failed", "undoes the fine-tune"}:
        return candidate
    if candidate.name == REFERENCE:
        return candidate.model_copy(update={"verdict": "within budget", "reason": "the reference"})
    over = "; ".join(budget_violations(candidate, reference.answers, budget))
    if over and candidate.grid:  # part of the fine-tune is gone, if not all of it
        over = f"{over}. {candidate.grid}"
    verdict = "over budget" if over else "within budget"
    return candidate.model_copy(update={"verdict": verdict, "reason": over or "loses no more than the budget"})


def _why(picked: Candidate, judged: Sequence[Candidate]) -> str:
    if picked.name == REFERENCE and not any(one.verdict == "within budget" for one in judged if one is not picked):
        return "no quantization is within the budget, so the half-precision file stays"
    if picked.score_per_s is None:
        return "the smallest within the budget; speed was not measured"
    best = max((one for one in judged if one.verdict == "within budget"), key=lambda one: one.score_per_s or 0.0)
    if best.score_per_s is None or best.score_per_s <= picked.score_per_s:
        return f"the fastest within the budget: {picked.score_per_s:.3g} examples/s"
    return (
        f"the smallest of the fastest within the budget: {picked.score_per_s:.3g} examples/s, which the rounds do not "
        f"tell from {best.name}'s {best.score_per_s:.3g}"
    )


def _against(picked: Candidate) -> str:
    if picked.verdict == "within budget":
        return ""
    verb = "is " if picked.verdict == "over budget" else ""
    return f", although it {verb}{picked.verdict}: {picked.reason}"


def _named(name: str, candidates: Sequence[Candidate]) -> Candidate:
    found = next((candidate for candidate in candidates if candidate.name == name), None)
    if found is None:
        known = ", ".join(candidate.name for candidate in candidates)
        raise RequestInvalid(f"no candidate {name!r} was made; there are {known or 'none'}")
    return found


# Kinds whose steps are so fine that a fine-tune survives being rounded to its base's grid (measured: Q8_0).
FINE_KINDS = frozenset({"F32", "F16", "BF16", "Q8_0"})


@dataclass(frozen=True)
class BaseDistances:
    """Where a candidate lies between base and fine-tune. KL divergences: means in nats over the same positions.

    `as_fine_tune` and `as_base` count, of the `differing` examples that base and fine-tune answer differently, those
    that the candidate answers as the one or the other; 0 where examples have no answers to compare.
    """

    kl_to_fine_tune: float
    kl_to_base: float
    as_fine_tune: int = 0
    as_base: int = 0
    differing: int = 0


def undo_reason(nearness: BaseDistances, base_distance: float, noise: float) -> str | None:
    """Why the candidate counts as undoing the fine-tune; None if it does not.

    It does when its distributions or its answers lie nearer the base's. `base_distance` is the mean KL divergence from
    fine-tune to base and `noise` that of the fine-tune to itself in another batch shape: where the former does not
    exceed the latter there is no fine-tune to lose, and nothing is refused.
    """
    if base_distance <= noise:
        return None
    found = []
    if nearness.kl_to_base < nearness.kl_to_fine_tune:
        found.append(
            f"mean KL divergence {nearness.kl_to_fine_tune:.3g} to the fine-tune, {nearness.kl_to_base:.3g} to its base"
        )
    if nearness.as_base > nearness.as_fine_tune:
        found.append(
            f"of {nearness.differing} examples the two answer differently it answers {nearness.as_base} as the base, "
            f"{nearness.as_fine_tune} as the fine-tune"
        )
    return "; ".join(found) or None


def shared_grid(base: Header, candidate: Header, tuned: Collection[str]) -> Mapping[str, int]:
    """Of the `tuned` tensors, how many are quantized in `candidate` to the coarse kind they had in `base`, by kind."""
    kinds = (
        candidate.tensors[name].kind.name
        for name in tuned
        if name in base.tensors
        and name in candidate.tensors
        and candidate.tensors[name].kind == base.tensors[name].kind
    )
    return Counter(kind for kind in kinds if kind not in FINE_KINDS)


def undo_cause(grid: Mapping[str, int], n_tuned: int) -> str:
    """The cause, in words, of a fine-tune that is undone or nearly so, where `shared_grid` is `grid`."""
    if not grid:
        return "quantizing it loses more than fine-tuning changed"
    return (
        f"{sum(grid.values())} of {n_tuned} fine-tuned matrices are rounded to the very grid their base lay on "
        f"({', '.join(sorted(grid))}), whose steps are larger than the fine-tune's change"
    )
