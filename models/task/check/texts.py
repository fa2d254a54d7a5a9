"""Texts that are empty or too long, and answers that leave the schema or the style of the rest."""

import statistics
from collections.abc import Callable, Iterator, Sequence

from models.task.schema import canonical, fault
from models.task.splits import plain
from models.task.task import Task

from .finding import MAX_EXAMPLES, Example, Finding, Severity, keys, shown

CountTokens = Callable[[str], int]
MAX_CHARACTERS = 8000
MAX_TOKENS = 2048
# A habit that this share of the answers keeps is the style; the others are off it.
HABIT = 0.9
# Distance of a length from the median, in median absolute deviations.
FAR = 8.0


def text_findings(
    task: Task, examples: Sequence[Example], count_tokens: CountTokens | None = None
) -> Iterator[Finding]:
    """Empty texts, and texts longer than a small model reads well."""
    empty = [example for example in examples if not any(map(str.isalnum, plain(example.text)))]
    yield from _finding(task, "empty texts", "look", "texts have no letter and no digit", empty)
    if count_tokens is None:
        long = [(len(example.text), example) for example in examples if len(example.text) > MAX_CHARACTERS]
        unit, limit = "characters", MAX_CHARACTERS
    else:
        counted = [(count_tokens(example.text), example) for example in examples]
        long = [(n, example) for n, example in counted if n > MAX_TOKENS]
        unit, limit = "tokens", MAX_TOKENS
    if long:
        yield Finding(
            kind="long texts",
            severity="look",
            n=len(long),
            what=f"texts have more than {limit:,} {unit}: slow to train on, and cut or refused when served",
            examples=tuple(f"{one.where}: {n:,} {unit}: {shown(one.text, 60)}" for n, one in long[:MAX_EXAMPLES]),
            mend=f"shorten them in the file, or: deskside task apply {task.address} --drop 'long texts'",
            rows=keys([one for _, one in long]),
            drops=keys([one for _, one in long]),
        )


def schema_findings(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    """Answers that are not JSON of the task's schema, or not written as they will be served."""
    schema = task.spec.json_schema or {}
    off = [(why, example) for example in examples if (why := fault(example.answer, schema))]
    unfit = {example.key for _, example in off}
    fitting = [example for example in examples if example.key not in unfit]
    loose = [example for example in fitting if example.answer != canonical(example.answer, schema)]
    what = "answers have white space between their parts, or keys out of the schema's order: served ones will not"
    yield from _finding(task, "off the form", "look", what, loose, answers=True)
    if off:
        yield Finding(
            kind="off the schema",
            severity="mend",
            n=len(off),
            what="answers do not fit `schema` in task.toml: served answers will always fit, and be wrong here",
            examples=tuple(f"{example.where}: {shown(why)}" for why, example in off[:MAX_EXAMPLES]),
            mend=f"widen [schema] in {str(task.folder / 'task.toml')!r}, or: deskside task apply {task.address} "
            "--drop 'off the schema'",
            rows=keys([example for _, example in off]),
            drops=keys([example for _, example in off]),
        )


_HABITS: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("end with a full stop or the like", "do not", lambda answer: answer[-1:] in ".!?…。！？"),
    ("begin with a capital letter", "do not", lambda answer: answer[:1].isupper()),
    ("have one line", "have several", lambda answer: "\n" not in answer),
)


def style_findings(task: Task, examples: Sequence[Example]) -> Iterator[Finding]:
    """Answers unlike the rest, by ending, beginning, lines and length; the task writes."""
    for habit, unlike, keeps in _HABITS:
        keeping = [example for example in examples if keeps(example.answer)]
        other = [example for example in examples if not keeps(example.answer)]
        if keeping and other and len(keeping) >= HABIT * len(examples):
            what = f"answers {unlike}, where {len(keeping)} {habit}"
            yield from _finding(task, "off the style", "look", what, other, answers=True)
        elif keeping and other and len(other) >= HABIT * len(examples):
            what = f"answers {habit}, where {len(other)} {unlike}"
            yield from _finding(task, "off the style", "look", what, keeping, answers=True)
    lengths = [len(example.answer) for example in examples]
    middle = statistics.median(lengths)
    spread = max(1.0, statistics.median(abs(length - middle) for length in lengths))
    far = [example for example in examples if abs(len(example.answer) - middle) > FAR * spread]
    what = f"answers are much longer or shorter than the typical {middle:.0f} characters"
    yield from _finding(task, "off the style", "look", what, far, answers=True)


def _finding(
    task: Task, kind: str, severity: Severity, what: str, rows: Sequence[Example], *, answers: bool = False
) -> Iterator[Finding]:
    if rows:
        said = (f"{one.where}: {shown(one.answer if answers else one.text)!r}" for one in rows[:MAX_EXAMPLES])
        yield Finding(
            kind=kind,
            severity=severity,
            n=len(rows),
            what=what,
            examples=tuple(said),
            mend=f"edit these lines in {str(task.folder / 'data')!r}, or: "
            f"deskside task apply {task.address} --drop {kind!r}",
            rows=keys(rows),
            drops=keys(rows),
        )
