"""The classes of a task: names that are nearly the same, too few examples, imbalance, texts that tell the label."""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from models.task.splits import plain
from models.task.task import SPLITS, Task

from .finding import MAX_EXAMPLES, Example, Finding, keys, shown

FEW_TRAIN = 10
FEW_HELD_OUT = 5
IMBALANCE = 10
# A class is given away if its name is in this share of its own texts, and in no more than that of the others.
GIVEN_AWAY, ELSEWHERE, MIN_GIVEN = 0.8, 0.2, 5


def label_findings(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    """All findings about labels; the task classifies."""
    yield from _variants(task, examples)
    yield from _few(task, examples)
    yield from _imbalance(examples)
    yield from _given_away(task, examples)


def _variants(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    counts = Counter(example.answer for example in examples)
    alike: dict[str, list[str]] = defaultdict(list)
    for label in task.spec.labels:
        alike[plain(label)].append(label)
    for labels in (labels for labels in alike.values() if len(labels) > 1):
        kept = max(labels, key=lambda label: (counts[label], label))
        renames = " ".join(f"--relabel {shlex.quote(f'{label}={kept}')}" for label in labels if label != kept)
        yield Finding(
            kind="label variants",
            severity="look",
            n=len(labels),
            what="labels differ only by case, spaces or punctuation",
            examples=tuple(f"{label!r} ({counts[label]} examples)" for label in labels[:MAX_EXAMPLES]),
            mend=f"deskside task apply {task.address} {renames}",
            rows=keys([example for example in examples if example.answer in labels and example.answer != kept]),
        )


def _few(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    counts = Counter((example.split, example.answer) for example in examples)
    limits = dict.fromkeys(SPLITS, FEW_HELD_OUT) | {"train": FEW_TRAIN}
    short = [
        f"{label!r}: {', '.join(f'{counts[split, label]} {split}' for split in SPLITS)}"
        for label in task.spec.labels
        if any(counts[split, label] < limits[split] for split in SPLITS)
    ]
    if short:
        yield Finding(
            kind="few examples",
            severity="look",
            n=len(short),
            what=f"classes have fewer than {FEW_TRAIN} train or {FEW_HELD_OUT} held-out examples",
            examples=tuple(short[:MAX_EXAMPLES]),
            mend="add examples of these classes and make the task again, or merge classes: "
            f"deskside task apply {task.address} --relabel OLD=NEW",
        )


def _imbalance(examples: Sequence[Example]) -> Iterator[Finding]:
    counts = Counter(example.answer for example in examples if example.split == "train").most_common()
    if len(counts) > 1 and counts[0][1] >= IMBALANCE * counts[-1][1]:
        yield Finding(
            kind="imbalance",
            severity="note",
            n=len(counts),
            what=f"the largest class has {counts[0][1] / counts[-1][1]:.0f} times the train examples of the smallest; "
            f"always saying {counts[0][0]!r} is right for {counts[0][1] / sum(n for _, n in counts):.0%}",
            examples=tuple(f"{label!r}: {n}" for label, n in (counts[0], counts[-1])),
            mend="add examples of the small classes; judge by macro-F1, not by accuracy alone",
        )


def _given_away(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    padded = [(f" {plain(example.text)} ", example) for example in examples]
    for label in task.spec.labels:
        name = f" {plain(label)} "
        own = [example for text, example in padded if example.answer == label and name in text]
        n_own = sum(example.answer == label for example in examples)
        n_other = sum(example.answer != label and name in text for text, example in padded)
        elsewhere = n_other / max(1, len(examples) - n_own)
        if n_own >= MIN_GIVEN and len(own) >= GIVEN_AWAY * n_own and elsewhere <= ELSEWHERE:
            yield Finding(
                kind="label in text",
                severity="look",
                n=len(own),
                what=f"of {n_own} texts of {label!r} contain the label itself, and {elsewhere:.0%} of the others: "
                "a model learns to look for it, and fails where new texts lack it",
                examples=tuple(f"{example.where}: {shown(example.text, 70)}" for example in own[:MAX_EXAMPLES]),
                mend="if new texts will not contain it, take it out of the text column and make the task again",
                rows=keys(own),
            )
