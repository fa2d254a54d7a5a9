"""Texts that occur twice, nearly twice, under two answers, or in two splits."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from models.task.splits import near_pairs, plain
from models.task.task import Task

from .finding import MAX_EXAMPLES, Example, Finding, keys, shown

# Where two splits share a text, the one named first here keeps it: a test split that shrinks measures less.
_KEPT = ("test", "validation", "train")


def duplicate_findings(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    """Leakage, conflicting answers, exact and near duplicates. Near ones by the share in `task.toml`."""
    by_text: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_text[plain(example.text)].append(example)
    texts = list(by_text)
    share = task.spec.splits.near
    pairs = near_pairs(texts, share) if share < 1 else []
    near = [(by_text[texts[one]], by_text[texts[other]]) for one, other in pairs]
    yield from _leakage(task, by_text, near)
    yield from _conflicts(task, by_text)
    yield from _repeated(task, by_text)
    yield from _alike(near, share)


def _leakage(
    task: Task, by_text: dict[str, list[Example]], near: Sequence[tuple[list[Example], list[Example]]]
) -> Iterator[Finding]:
    """Texts, equal or near, that are in two splits. All members but those of the split that keeps them are dropped."""
    dropped: dict[tuple[str, str], Example] = {}
    said = []
    for group in [*by_text.values(), *([*one, *other] for one, other in near)]:
        split = min((example.split for example in group), key=_KEPT.index)
        others = [example for example in group if example.split != split]
        for example in others:
            dropped[example.split, example.record.id] = example
        if others:
            first = next(example for example in group if example.split == split)
            said.append(f"{others[0].where} is as {first.where}: {shown(first.text, 70)}")
    if dropped:
        yield Finding(
            kind="leakage",
            severity="mend",
            n=len(dropped),
            what="examples are equal or nearly equal to examples of another split: scores would be too high",
            examples=tuple(said[:MAX_EXAMPLES]),
            mend=f"deskside task apply {task.address} --drop leakage",
            rows=keys(list(dropped.values())),
            drops=keys(list(dropped.values())),
        )


def _conflicts(task: Task, by_text: dict[str, list[Example]]) -> Iterator[Finding]:
    found = [group for group in by_text.values() if len({example.answer for example in group}) > 1]
    if not found or task.spec.kind == "write":
        return
    rows = [example for group in found for example in group]
    yield Finding(
        kind="conflicts",
        severity="look",
        n=len(found),
        what="texts occur with different answers: one of them is wrong, or the text does not decide",
        examples=tuple(
            f"{', '.join(f'{one.where} {shown(one.answer, 24)!r}' for one in group[:3])}: {shown(group[0].text, 60)}"
            for group in found[:MAX_EXAMPLES]
        ),
        mend=(f"deskside task review {task.address} (they come first), or " if task.spec.kind == "classify" else "")
        + f"deskside task apply {task.address} --drop conflicts",
        rows=keys(rows),
        drops=keys(rows),
    )


def _repeated(task: Task, by_text: dict[str, list[Example]]) -> Iterator[Finding]:
    later: list[Example] = []
    said = []
    for group in by_text.values():
        first: dict[tuple[str, str], Example] = {}
        for example in group:
            kept = first.setdefault((example.split, example.answer), example)
            if kept is not example:
                later.append(example)
                said.append(f"{example.where} repeats {kept.where}: {shown(example.text, 70)}")
    if later:
        yield Finding(
            kind="duplicates",
            severity="look",
            n=len(later),
            what="examples repeat an earlier one of their split, text and answer",
            examples=tuple(said[:MAX_EXAMPLES]),
            mend=f"deskside task apply {task.address} --drop duplicates",
            rows=keys(later),
            drops=keys(later),
        )


def _alike(near: Sequence[tuple[list[Example], list[Example]]], share: float) -> Iterator[Finding]:
    within = [(one[0], other[0]) for one, other in near if one[0].split == other[0].split]
    if within:
        yield Finding(
            kind="near duplicates",
            severity="note",
            n=len(within),
            what=f"pairs inside a split share more than {share:.0%} of the shorter one's five-word runs",
            examples=tuple(
                f"{one.where} and {other.where}: {shown(one.text, 70)}" for one, other in within[:MAX_EXAMPLES]
            ),
            mend="nothing need be done: `task new` keeps such texts in one split",
            rows=keys([example for pair in within for example in pair]),
        )
