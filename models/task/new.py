"""Make a task of a file: which columns, what kind of answer, which split, each guessed unless given, and reported."""

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.common.chat_records import MAX_LABELS, ChatMessage, ChatRecord, answers_repeat
from models.common.file_kinds import ANSWER_NAMES, TEXT_NAMES
from models.common.files import discard
from models.errors import BadTable, BadTask

from .readers.read import read_rows
from .readers.table import ReadOptions, TextTable
from .schema import canonical, fault, guess_schema
from .splits import split_by_content
from .task import SCORERS, SPLITS, SplitRule, Task, TaskSpec, WorkKind, new_folder, text_of, write_task

MIN_ROWS = 20
MAX_LABEL_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class NewTask:
    """A user's order. `inputs` and `output` are columns, `kind` the task's; empty or None is guessed."""

    name: str
    file: Path
    inputs: tuple[str, ...] = ()
    output: str | None = None
    kind: WorkKind | None = None
    prompt: str = "{input}"
    licence: str = ""
    seed: int = 0
    reading: ReadOptions | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A task that was made, and what was found on the way: (what, found, how it is changed)."""

    task: Task
    found: tuple[tuple[str, str, str], ...]
    sizes: dict[str, int]


def make_task(wanted: NewTask) -> Made:
    """Read, guess, split, write; the file itself is not changed.

    Raises BadTable, BadExamples or BadTask; then nothing is left behind.
    """
    folder = new_folder(wanted.name)
    given = read_rows(wanted.file, wanted.reading)
    found: list[tuple[str, str, str]] = []
    if isinstance(given, TextTable):
        records = _records(given, wanted, found)
    else:
        found.append(("file", "chat records", ""))
        records = list(given)
    if len(records) < MIN_ROWS:
        raise BadTask(
            f"{str(wanted.file)!r} has {len(records)} examples; a task needs {MIN_ROWS}, and learns little from fewer "
            "than some hundred. Add examples"
        )
    kind = wanted.kind or _kind([record.answer for record in records])
    found.append(("kind", kind, "" if wanted.kind else "guessed; --kind"))
    spec = _spec(kind, records, wanted)
    if spec.json_schema is not None:
        records = [replace(one, answer=canonical(one.answer, spec.json_schema)) for one in records]
        found.append(("answers", "JSON without white space, keys in the schema's order", ""))
    strata = [record.answer if kind == "classify" else "" for record in records]
    splits, near = split_by_content([text_of(record) for record in records], strata, wanted.seed)
    spec = spec.model_copy(update={"splits": SplitRule(seed=wanted.seed, near=near)})
    if near > 0.5:
        held = "texts that are equal" if near == 1 else f"texts that share {near:.0%} of their word runs"
        found.append(("near texts", f"many come from one template: only {held} stay in one split", ""))
    parted = {name: [one for one, split in zip(records, splits, strict=True) if split == name] for name in SPLITS}
    if empty := next((name for name in SPLITS if not parted[name]), None):
        raise BadTask(f"the {empty} split would be empty: too few of the {len(records)} texts differ from each other")
    return Made(_written(folder, spec, parted), tuple(found), {name: len(parted[name]) for name in SPLITS})


def _written(folder: Path, spec: TaskSpec, parted: dict[str, list[ChatRecord]]) -> Task:
    """Write beside the final place and rename: the task is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        write_task(staging, spec, parted)
        staging.rename(folder)
    except BaseException:
        discard(staging)
        raise
    return Task(folder, spec)


def _records(table: TextTable, wanted: NewTask, found: list[tuple[str, str, str]]) -> list[ChatRecord]:
    found.append(("file", table.form, "--encoding, --separator, --header"))
    output = wanted.output or guess_output(table, wanted.inputs)
    inputs = wanted.inputs or (guess_input(table, output),)
    answers = table.column(output)
    texts = list(zip(*(table.column(name) for name in inputs), strict=True))
    if output in inputs:
        raise BadTable(f"column {output!r} cannot be both --input and --output")
    found.append(("text", " + ".join(map(repr, inputs)), "" if wanted.inputs else "guessed; --input"))
    found.append(("answer", repr(output), "" if wanted.output else "guessed; --output"))
    records, blank = [], []
    for line, cells, answer in zip(table.lines, texts, answers, strict=True):
        text = "\n\n".join(cell.strip() for cell in cells if cell.strip())
        if text and answer.strip():
            records.append(ChatRecord(str(line), line, (ChatMessage("user", text),), answer.strip()))
        else:
            blank.append(line)
    if blank:
        shown = ", ".join(map(str, blank[:8])) + (" …" if len(blank) > 8 else "")
        found.append(("left out", f"{len(blank)} rows without text or answer: lines {shown}", ""))
    return records


def guess_output(table: TextTable, inputs: Sequence[str] = ()) -> str:
    """The column that holds the answer: by its name, else by answers that repeat, else the last. Raises BadTable."""
    left = [column for column in table.columns if column not in inputs]
    if not left or len(table.columns) < 2:
        raise BadTable(
            f"{str(table.path)!r} has one column ({table.form}); a task needs a text and an answer. If it has more, "
            "give --separator"
        )
    lower = {column.strip().lower(): column for column in reversed(left)}
    if named := next((lower[name] for name in ANSWER_NAMES if name in lower), None):
        return named
    repeating = [column for column in left if _label_like(table.column(column))]
    return repeating[-1] if repeating else left[-1]


def guess_input(table: TextTable, output: str) -> str:
    """The column that holds the text: by its name, else the one with the longest cells."""
    left = [column for column in table.columns if column != output]
    if not left:
        raise BadTable(f"{str(table.path)!r} has no column beside {output!r}; a task needs a text, too")
    lower = {column.strip().lower(): column for column in reversed(left)}
    if named := next((lower[name] for name in TEXT_NAMES if name in lower), None):
        return named
    return max(left, key=lambda column: sum(map(len, table.column(column))))


def _label_like(cells: Sequence[str]) -> bool:
    given = [cell.strip() for cell in cells if cell.strip()]
    return answers_repeat(given) and max(map(len, given)) <= MAX_LABEL_CHARACTERS


def _kind(answers: Sequence[str]) -> WorkKind:
    if all(_is_object(answer) for answer in answers):
        return "extract"
    few = len(set(answers)) == 1 or _label_like(answers)
    return "classify" if few else "write"


def _is_object(answer: str) -> bool:
    try:
        return isinstance(json.loads(answer), dict)
    except (ValueError, RecursionError):
        return False


def _spec(kind: WorkKind, records: Sequence[ChatRecord], wanted: NewTask) -> TaskSpec:
    answers = [record.answer for record in records]
    labels: tuple[str, ...] = ()
    schema = None
    if kind == "classify":
        counts = Counter(answers)
        labels = tuple(sorted(counts))
        if len(labels) < 2:
            raise BadTask(
                f"every answer is {labels[0][:80]!r}: with one class there is nothing to tell apart. Add others"
            )
        if len(labels) > MAX_LABELS:
            raise BadTask(
                f"{len(labels)} distinct answers, limit of kind classify {MAX_LABELS}: choose another --output column, "
                "merge classes, or give --kind write"
            )
    if kind == "extract":
        if bad := next((record for record in records if not _is_object(record.answer)), None):
            raise BadTask(
                f"line {bad.line}: {fault(bad.answer, {}) or 'no JSON object'}: {bad.answer[:80]!r}; --kind write?"
            )
        schema = guess_schema(answers)
    if wanted.prompt.count("{input}") != 1:
        raise BadTask(f"--prompt must hold {{input}} once, in the place of the text; got {wanted.prompt!r}")
    try:
        spec = TaskSpec(kind=kind, prompt=wanted.prompt, labels=labels, scorer=SCORERS[kind][0], schema=schema)
    except ValueError as error:
        raise BadTask(str(error).splitlines()[-1].strip()) from error
    return spec.model_copy(update={"licence": wanted.licence, "source": wanted.file.name})
