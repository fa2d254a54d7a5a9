"""Count of broken promises: half of the held-out examples calibrate, the other half is answered.

    python -m benchmarks.calibration.splits models/email_triage/results/label_scores.json
    python -m benchmarks.calibration.splits models/email_triage/results/label_scores.json \\
        --fit validation --out models/email_triage/results/calibration.toml

A promise counts as broken if fewer of the automatic answers in the other half are right than the target says. The
second form fits one split, as conversion does, and writes the `[calibration]` of a manifest.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tomli_w

from models.calibration.fit import LabelScores, ScoredExample, calibrate, judge
from models.calibration.record import TARGETS, Promise
from models.common.files import write_atomic

N_SPLITS = 100


@dataclass(frozen=True, slots=True)
class KeptPromises:
    """One target over all splits: how many promises were broken, and the share of automatic answers in each split.

    `none` counts the splits without a threshold, which promise nothing.
    """

    target: float
    broken: int
    none: int
    coverage: tuple[float, ...]


def read_scores(path: Path) -> LabelScores:
    """The file that `label_scores` writes."""
    return LabelScores.model_validate_json(path.read_text(encoding="utf-8"))


def part(scores: LabelScores, examples: Sequence[ScoredExample]) -> LabelScores:
    """The scores of some of the examples."""
    return scores.model_copy(update={"examples": tuple(examples)})


def kept_promises(
    scores: LabelScores, n_splits: int = N_SPLITS, targets: Sequence[float] = TARGETS
) -> list[KeptPromises]:
    """Split `n_splits` times at random, by the seeds 0, 1, …; calibrate on one half and count in the other."""
    outcomes: dict[float, list[float | None]] = {target: [] for target in targets}
    coverage: dict[float, list[float]] = {target: [] for target in targets}
    for seed in range(n_splits):
        shuffled = random.Random(seed).sample(scores.examples, len(scores.examples))
        half = len(shuffled) // 2
        calibration = calibrate(part(scores, shuffled[:half]), targets)
        answered = part(scores, shuffled[half:])
        for promise in calibration.promises:
            right = automatic_answers(promise, answered, calibration.temperature)
            coverage[promise.target].append(len(right) / len(answered.examples))
            outcomes[promise.target].append(fmean(right) if right else None)
    return [
        KeptPromises(
            target=target,
            broken=sum(share is not None and share < target for share in shares),
            none=sum(share is None for share in shares),
            coverage=tuple(coverage[target]),
        )
        for target, shares in outcomes.items()
    ]


def automatic_answers(promise: Promise, scores: LabelScores, temperature: float) -> list[bool]:
    """For each automatic answer, whether it is right."""
    threshold = promise.threshold
    return [one.right for one in judge(scores, temperature) if threshold is not None and one.confidence >= threshold]


def main() -> None:
    """Read the options; print the table, or write the fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, help="the file of label_scores")
    parser.add_argument("--splits", type=int, default=N_SPLITS, help="how many random halves")
    parser.add_argument("--fit", metavar="SPLIT", help="fit the examples of this split instead")
    parser.add_argument("--out", type=Path, help="with --fit: the file to write")
    chosen = parser.parse_args()
    scores = read_scores(chosen.scores)
    if chosen.fit is None:
        for one in kept_promises(scores, chosen.splits):
            print(
                f"target {one.target:g}: {one.broken} of {chosen.splits} promises broken, {fmean(one.coverage):.1%} of "
                f"the answers automatic (mean; {min(one.coverage):.0%} to {max(one.coverage):.0%}), none in "
                f"{one.none} splits"
            )
        return
    fitted = part(scores, [one for one in scores.examples if one.split == chosen.fit])
    calibration = calibrate(fitted, source=f"{chosen.fit} split")
    text = tomli_w.dumps({"calibration": calibration.model_dump(mode="json", exclude_none=True)})
    if chosen.out is not None:
        write_atomic(chosen.out, text)
    others = part(scores, [one for one in scores.examples if one.split != chosen.fit])
    for promise in calibration.promises:
        right = automatic_answers(promise, others, calibration.temperature)
        share = f"{len(right) / len(others.examples):.1%} of the other examples automatic, {sum(right)} right"
        print(f"target {promise.target:g}: threshold {promise.threshold}, {share} of {len(right)}")


if __name__ == "__main__":
    main()
