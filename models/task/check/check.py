"""`deskside task check`: everything that can be seen in seconds, before any training."""

from collections.abc import Iterator, Sequence

from models.task.task import Task, rows
from models.task.words.curve import advice, learning_curve
from models.task.words.doubt import Advance, doubts

from .duplicates import duplicate_findings
from .finding import CheckReport, Example, Finding, LearningPoint, RowKey, Suspicion, shown
from .labels import label_findings
from .privacy import personal_findings
from .texts import CountTokens, schema_findings, style_findings, text_findings

# Share of the examples that is shown as suspicious, and its limits.
SUSPICIOUS_SHARE, MIN_SUSPICIOUS, MAX_SUSPICIOUS = 0.1, 20, 200
_URGENCY = {"mend": 0, "look": 1, "note": 2}


def check_task(task: Task, count_tokens: CountTokens | None = None, advance: Advance | None = None) -> CheckReport:
    """Check a task. `count_tokens` is the base's tokenizer, where one is at hand; characters count without it.

    Raises BadTask for a folder that does not fit its `task.toml`.
    """
    examples = [Example(split, record) for split, record in rows(task)]
    findings = list(findings_of(task, examples, count_tokens))
    suspicious: tuple[Suspicion, ...] = ()
    curve: tuple[LearningPoint, ...] = ()
    said, accuracy = "", None
    if task.spec.kind == "classify":
        suspicious, accuracy = suspicions(task, examples, findings, advance)
        if wrong := [one for one in suspicious if one.suggested != one.label]:
            findings.append(_doubtful(task, wrong, len(examples)))
        train = [example for example in examples if example.split == "train"]
        if len(train) >= 4 * len(task.spec.labels):
            points = learning_curve([one.text for one in train], [one.answer for one in train])
            curve = tuple(
                LearningPoint(n_rows=p.n_rows, accuracy=p.accuracy.estimate, low=p.accuracy.low, high=p.accuracy.high)
                for p in points
            )
            said = advice(points)
    return CheckReport(
        task=task.name,
        kind=task.spec.kind,
        sizes={split: sum(example.split == split for example in examples) for split in ("train", "validation", "test")},
        findings=tuple(sorted(findings, key=lambda finding: _URGENCY[finding.severity])),
        suspicious=suspicious,
        curve=curve,
        advice=said,
        word_accuracy=accuracy,
    )


def findings_of(task: Task, examples: Sequence[Example], count_tokens: CountTokens | None = None) -> Iterator[Finding]:
    """The findings that need no model."""
    yield from duplicate_findings(task, examples)
    if task.spec.kind == "classify":
        yield from label_findings(task, examples)
    yield from text_findings(task, examples, count_tokens)
    if task.spec.kind == "extract":
        yield from schema_findings(task, examples)
    if task.spec.kind == "write":
        yield from style_findings(task, examples)
    yield from personal_findings(examples)


def suspicions(
    task: Task, examples: Sequence[Example], findings: Sequence[Finding], advance: Advance | None = None
) -> tuple[tuple[Suspicion, ...], float]:
    """The labels to look at, those of conflicting texts first, then by doubt; and the word model's accuracy."""
    judged = doubts([one.text for one in examples], [one.answer for one in examples], advance)
    torn = {key for finding in findings if finding.kind == "conflicts" for key in finding.rows}
    n = min(MAX_SUSPICIOUS, max(MIN_SUSPICIOUS, round(SUSPICIOUS_SHARE * len(examples))))
    ranked = [row for row in judged.ranked() if judged.suggested[row] != examples[row].answer][:n]
    conflicting = [row for row, example in enumerate(examples) if example.key in torn]
    found = tuple(
        Suspicion(
            key=examples[row].key,
            text=examples[row].text,
            label=examples[row].answer,
            suggested=judged.suggested[row],
            confidence=round(judged.confidence[row], 4),
        )
        for row in dict.fromkeys(conflicting + ranked)
    )
    return found, judged.accuracy


def _doubtful(task: Task, wrong: Sequence[Suspicion], n_examples: int) -> Finding:
    return Finding(
        kind="doubtful labels",
        severity="look",
        n=len(wrong),
        what=f"of {n_examples} labels are the least likely by the other examples; some are wrong, many are merely hard",
        examples=tuple(f"{one.label!r}, rather {one.suggested!r}: {shown(one.text, 70)}" for one in wrong[:5]),
        mend=f"deskside task review {task.address}",
        rows=tuple(one.key for one in wrong),
    )


def dropped_by(task: Task, kinds: Sequence[str]) -> dict[RowKey, str]:
    """The rows that `--drop KIND` takes out, each with its kind; findings that need the word model drop nothing."""
    examples = [Example(split, record) for split, record in rows(task)]
    findings = list(findings_of(task, examples))
    return {key: finding.kind for finding in findings if finding.kind in kinds for key in finding.drops}
