"""Decisions on examples: keep, relabel or drop. A file of them is applied whole or not at all, and can be undone.

NAME/history/0001/decisions.json      what was decided
NAME/history/0001/{task.toml,…}       the files as they were before, byte for byte
"""

import gzip
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError, model_validator

from models.common.chat_records import ChatRecord
from models.common.files import discard, sync, write_atomic
from models.common.record import Record
from models.errors import BadTask
from models.task.check.finding import RowKey
from models.task.task import DATA_FOLDER, TASK_FILE, Task, dump_records, dump_spec, open_task, text_of

HISTORY_FOLDER = "history"
DECISIONS_FILE = "decisions.json"
UNDONE = "-undone"


class RowDecision(Record):
    """A decision on one example. `label` and `digest` are of the example as it was seen: a changed one is refused."""

    split: str
    id: str
    digest: str
    label: str
    action: Literal["keep", "relabel", "drop"]
    to: str | None = None

    @model_validator(mode="after")
    def _relabel_has_a_label(self) -> "RowDecision":
        if (self.action == "relabel") != bool(self.to and self.to.strip()):
            raise ValueError(f"'to', the new label, belongs to 'relabel' and to nothing else; example {self.id!r}")
        return self


class DecisionFile(Record):
    """The file that the review page saves."""

    schema_version: Literal[1] = 1
    task: str
    decisions: tuple[RowDecision, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """Numbers of what was done. `entry` is the folder with the files as they were; None if nothing was decided."""

    n_kept: int
    n_relabelled: int
    n_dropped: int
    entry: Path | None


def digest_of(record: ChatRecord) -> str:
    """16 hex digits of the example's text."""
    return hashlib.sha256(text_of(record).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def decision(
    split: str, record: ChatRecord, action: Literal["keep", "relabel", "drop"], to: str | None = None
) -> RowDecision:
    """A decision on `record` as it is now."""
    return RowDecision(split=split, id=record.id, digest=digest_of(record), label=record.answer, action=action, to=to)


def read_decisions(path: Path) -> DecisionFile:
    """Read the page's file. Raises BadTask."""
    try:
        return DecisionFile.model_validate_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadTask(
            f"there is no file {str(path)!r}; `deskside task review` makes a page whose button saves it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadTask(f"{str(path)!r} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadTask(
            f"{str(path)!r} is no file of decisions: {where + ': ' if where else ''}{first['msg']}"
        ) from error


def apply_decisions(task: Task, decisions: Sequence[RowDecision]) -> Applied:
    """Change the examples. Raises BadTask, and changes nothing, if a decision does not fit the examples as they are.

    Decisions that are carried out already are left out, so that a stopped run can be repeated.
    """
    before = task.all_records()
    labels = [*task.spec.labels]
    pending = _pending(task, before, decisions)
    if task.spec.kind == "classify":
        labels = _labels_after(labels, before, pending)
    after = {split: _changed(split, records, pending) for split, records in before.items()}
    if bare := next((split for split, records in after.items() if not records), None):
        raise BadTask(f"the {bare} split of {task.name!r} would be empty; nothing was changed")
    changed = [split for split in before if after[split] != list(before[split])]
    spec = task.spec.model_copy(update={"labels": tuple(labels)})
    actions = [one.action for one in pending.values()]
    entry = None
    if pending:
        entry = _journal(task, decisions, changed, spec_changes=spec != task.spec)
        if spec != task.spec:
            # Labels of both, while splits are changed one after the other: a stop in between leaves a task that opens.
            both = tuple(dict.fromkeys((*task.spec.labels, *labels)))
            write_atomic(task.folder / TASK_FILE, dump_spec(task.spec.model_copy(update={"labels": both})))
        for split in changed:
            _write(task.file(split), after[split])
        if spec != task.spec:
            write_atomic(task.folder / TASK_FILE, dump_spec(spec))
    return Applied(actions.count("keep"), actions.count("relabel"), actions.count("drop"), entry)


def undo(task: Task) -> Path:
    """Bring back the files as they were before the last `apply`, and return its folder. Raises BadTask without one."""
    entries = _entries(task)
    if not entries:
        raise BadTask(f"nothing was applied to {task.name!r}, so there is nothing to undo")
    last = entries[-1]
    for path in last.iterdir():
        if path.name != DECISIONS_FILE:
            target = task.folder / (path.name if path.name == TASK_FILE else f"{DATA_FOLDER}/{path.name}")
            write_atomic(target, path.read_bytes())
    undone = last.with_name(last.name + UNDONE)
    last.rename(undone)
    sync(undone.parent)
    open_task(str(task.folder)).all_records()
    return undone


def kept(task: Task) -> set[tuple[str, str]]:
    """(digest, label) of every example that was looked at and kept: it need not be shown again."""
    files = [read_decisions(entry / DECISIONS_FILE) for entry in _entries(task)]
    return {(one.digest, one.label) for file in files for one in file.decisions if one.action == "keep"}


def relabelled(task: Task, renames: Iterable[tuple[str, str]]) -> list[RowDecision]:
    """Decisions that give every example of one label another. Raises BadTask for a label without examples."""
    made = []
    for old, new in renames:
        rows = [(split, one) for split, records in task.all_records().items() for one in records if one.answer == old]
        if not rows:
            shown = ", ".join(map(repr, task.spec.labels[:20]))
            raise BadTask(f"no example of {task.name!r} has the label {old!r}; labels are {shown}")
        made += [decision(split, record, "relabel", new) for split, record in rows]
    return made


def _pending(
    task: Task, before: dict[str, tuple[ChatRecord, ...]], decisions: Sequence[RowDecision]
) -> dict[RowKey, RowDecision]:
    found = {RowKey(split=split, id=one.id): one for split, records in before.items() for one in records}
    pending: dict[RowKey, RowDecision] = {}
    for one in decisions:
        key = RowKey(split=one.split, id=one.id)
        record = found.get(key)
        if record is None:
            if one.action == "drop":
                continue
            raise BadTask(
                f"{task.name!r} has no example {one.id!r} in {one.split!r}; review again, nothing was changed"
            )
        if digest_of(record) == one.digest and one.action == "relabel" and record.answer == one.to:
            continue
        if digest_of(record) != one.digest or record.answer != one.label:
            raise BadTask(
                f"example {one.id!r} in {one.split!r} (line {record.line}) was changed after it was decided: its "
                f"answer is {record.answer[:60]!r}, was {one.label[:60]!r}. Review again; nothing was changed"
            )
        pending[key] = one
    return pending


def _labels_after(
    labels: list[str], before: dict[str, tuple[ChatRecord, ...]], pending: dict[RowKey, RowDecision]
) -> list[str]:
    """The labels with the new ones, and without those that lose every example to a new label."""
    changed = {one.label for one in pending.values() if one.action == "relabel"}
    answers = [
        (one.to if one is not None and one.action == "relabel" else record.answer)
        for split, records in before.items()
        for record in records
        for one in [pending.get(RowKey(split=split, id=record.id))]
    ]
    used = set(answers)
    added = sorted(used - set(labels) - {None}, key=str)
    after = [label for label in labels if label in used or label not in changed] + [str(label) for label in added]
    if len(after) < 2:
        raise BadTask("one class would be left, with nothing to tell apart; nothing was changed")
    return after


def _changed(split: str, records: Sequence[ChatRecord], pending: dict[RowKey, RowDecision]) -> list[ChatRecord]:
    made = []
    for record in records:
        one = pending.get(RowKey(split=split, id=record.id))
        if one is None or one.action == "keep":
            made.append(record)
        elif one.action == "relabel":
            made.append(replace(record, answer=str(one.to).strip()))
    return made


def _journal(task: Task, decisions: Sequence[RowDecision], changed: Sequence[str], *, spec_changes: bool) -> Path:
    history = task.folder / HISTORY_FOLDER
    history.mkdir(exist_ok=True)
    number = 1 + max((int(path.name[:4]) for path in history.glob("[0-9][0-9][0-9][0-9]*")), default=0)
    staging, entry = history / f".{number:04}", history / f"{number:04}"
    discard(staging)
    staging.mkdir()
    for path in [*(task.file(split) for split in changed), *([task.folder / TASK_FILE] if spec_changes else [])]:
        write_atomic(staging / path.name, path.read_bytes())
    file = DecisionFile(task=task.name, decisions=tuple(decisions))
    write_atomic(staging / DECISIONS_FILE, file.model_dump_json(indent=1, exclude_none=True) + "\n")
    staging.rename(entry)
    sync(history)
    return entry


def _entries(task: Task) -> list[Path]:
    return sorted((task.folder / HISTORY_FOLDER).glob("[0-9][0-9][0-9][0-9]"))


def _write(path: Path, records: Sequence[ChatRecord]) -> None:
    data = dump_records(records).encode("utf-8")
    write_atomic(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
