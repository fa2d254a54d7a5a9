"""A task: a folder with `task.toml` and its examples, which every verb takes by name or by path.

    NAME/task.toml                                  kind, prompt, labels or schema, scorer, licence, source
    NAME/data/{train,validation,test}.jsonl[.gz]    chat records; the user's message is the bare text

Named tasks are kept in `$DESKSIDE_HOME/tasks`. The folder may be edited by hand: what no longer fits is refused with
the line and the edit that mends it.
"""

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.common.chat_records import MAX_LABELS, ChatMessage, ChatRecord, read_chat_records
from models.common.files import default_home, write_atomic
from models.errors import BadExamples, BadTask, did_you_mean
from models.manifest import Prompt, TextTokens

from .schema import check_schema

TASK_FILE = "task.toml"
DATA_FOLDER = "data"
TASKS_FOLDER = "tasks"
INPUT_MARK = "{input}"
SPLITS = ("train", "validation", "test")

WorkKind = Literal["classify", "extract", "write"]
AnswerScorer = Literal["accuracy", "field-f1", "rouge-l", "exact-match"]
SCORERS: Mapping[WorkKind, tuple[AnswerScorer, ...]] = {
    "classify": ("accuracy",),
    "extract": ("field-f1", "exact-match"),
    "write": ("rouge-l", "exact-match"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SplitRule(BaseModel):
    """The way the examples were split: the seed of the hash, and the share of common word runs that ties two texts.

    `near` 1: only equal texts are kept together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    near: Annotated[float, Field(gt=0, le=1)] = 0.5


class TaskSpec(BaseModel):
    """`task.toml`. `prompt` is the user's message, with `{input}` for the text; `system` is the system's.

    Of a text only the first `max_text_tokens` tokens are read, in training and when served (None: the whole text).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = 1
    kind: WorkKind
    prompt: str = INPUT_MARK
    system: str = ""
    max_text_tokens: TextTokens | None = None
    labels: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    scorer: AnswerScorer
    licence: str = ""
    source: str = ""
    splits: SplitRule = SplitRule()

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "TaskSpec":
        if self.prompt.count(INPUT_MARK) != 1:
            raise ValueError(f"prompt must hold {INPUT_MARK} exactly once, got {self.prompt!r}")
        if self.scorer not in SCORERS[self.kind]:
            raise ValueError(f"scorer of kind {self.kind!r} is one of {', '.join(SCORERS[self.kind])}; {self.scorer!r}")
        if (self.kind == "classify") != bool(self.labels):
            raise ValueError("labels are listed by kind 'classify', and by no other")
        if self.labels and not 2 <= len(set(self.labels)) == len(self.labels) <= MAX_LABELS:
            raise ValueError(f"labels must be 2 to {MAX_LABELS}, each once; got {len(self.labels)}")
        if any(not label.strip() or label != label.strip() for label in self.labels):
            raise ValueError("a label is empty, or begins or ends with a space")
        if (self.kind == "extract") != (self.json_schema is not None):
            raise ValueError("schema, the answer's JSON schema, belongs to kind 'extract', and to no other")
        if self.json_schema is not None:
            check_schema(self.json_schema)
        self.manifest_prompt()
        return self

    def manifest_prompt(self) -> Prompt:
        """The prompt as a model's manifest holds it."""
        template = self.prompt.replace(INPUT_MARK, "{text}")
        return Prompt(template=template, system=self.system, max_text_tokens=self.max_text_tokens)


@dataclass(frozen=True, slots=True)
class Task:
    """A task's folder and what its `task.toml` says. Examples are read when they are asked for."""

    folder: Path
    spec: TaskSpec

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def address(self) -> str:
        """The task as a command takes it: its name, or the quoted path of a folder elsewhere."""
        named = self.folder.resolve().parent == tasks_home().resolve()
        return self.name if named else shlex.quote(str(self.folder))

    def file(self, split: str) -> Path:
        """The file of a split, plain or packed. Raises BadTask if there is none, or both."""
        plain = self.folder / DATA_FOLDER / f"{split}.jsonl"
        found = [path for path in (plain, plain.with_name(plain.name + ".gz")) if path.exists()]
        if len(found) == 1:
            return found[0]
        what = f"both {found[0].name} and {found[1].name} exist; delete one" if found else f"{str(plain)!r} is missing"
        raise BadTask(f"task {str(self.folder)!r}: {what}" + ("" if found else _mend_missing(self.folder, split)))

    def records(self, split: str) -> tuple[ChatRecord, ...]:
        """The examples of a split, in file order. Raises BadTask naming the line and the edit that mends it."""
        path = self.file(split)
        try:
            records = read_chat_records(path)
        except BadExamples as error:
            raise BadTask(f"task {str(self.folder)!r}: {error}") from error
        known = set(self.spec.labels)
        for record in records:
            if known and record.answer not in known:
                raise BadTask(
                    f"{str(path)!r}, line {record.line}: {record.answer[:80]!r} is none of the labels in {TASK_FILE}"
                    f"{did_you_mean(record.answer, known) or '.'} Correct the line, or add it to `labels`"
                )
        return records

    def all_records(self) -> dict[str, tuple[ChatRecord, ...]]:
        """The examples of every split, by its name."""
        return {split: self.records(split) for split in SPLITS}


def text_of(record: ChatRecord) -> str:
    """The text that an example is about: its messages but for the system's."""
    return "\n\n".join(message.content for message in record.prompt if message.role not in {"system", "developer"})


def rendered(task: Task, split: str) -> list[ChatRecord]:
    """The examples of a split with the task's prompt around their texts, as they will be asked."""
    prompt = task.spec.manifest_prompt()
    return [
        ChatRecord(record.id, record.line, _messages(prompt, record), record.answer) for record in task.records(split)
    ]


def _messages(prompt: Prompt, record: ChatRecord) -> tuple[ChatMessage, ...]:
    said = prompt.messages((message.role, message.content) for message in record.prompt)
    return tuple(ChatMessage(str(one["role"]), str(one["content"])) for one in said)


def tasks_home() -> Path:
    """The folder of the named tasks."""
    return default_home() / TASKS_FOLDER


def task_names() -> list[str]:
    """The named tasks, sorted; folders without `task.toml` are none."""
    return sorted(path.parent.name for path in tasks_home().glob(f"*/{TASK_FILE}"))


def new_folder(name: str) -> Path:
    """The folder for a task to be made. Raises BadTask if the name is not allowed or taken."""
    if not _NAME.fullmatch(name):
        raise BadTask(
            f"a task's name has 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first; got {name!r}"
        )
    folder = tasks_home() / name
    if folder.exists():
        raise BadTask(
            f"there is a task {name!r} already, in {str(folder)!r}; choose another name, or delete the folder"
        )
    return folder


def open_task(given: str) -> Task:
    """Open a task by its name, or by the path of its folder. Raises BadTask."""
    named = tasks_home() / given if _NAME.fullmatch(given) else None
    folder = named if named is not None and named.is_dir() else Path(given).expanduser()
    if folder.is_file() and folder.name == TASK_FILE:
        folder = folder.parent
    if not folder.is_dir():
        if folder.is_file():
            raise BadTask(f"{given!r} is a file, not a task; to make one of it: deskside task new NAME {given}")
        near = did_you_mean(given, task_names()) or "; deskside task list shows those there are"
        raise BadTask(f"there is no task {given!r}{near}")
    return Task(folder, read_spec(folder / TASK_FILE))


def read_spec(path: Path) -> TaskSpec:
    """Read `task.toml`. Raises BadTask naming the file, the field and what it may be."""
    try:
        return TaskSpec.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError as error:
        raise BadTask(f"{str(path.parent)!r} is a folder without {TASK_FILE}, not a task") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadTask(f"{str(path)!r} cannot be read: {error}. Mend that place; it is TOML in UTF-8") from error
    except ValidationError as error:
        raise BadTask(f"{str(path)!r}: {_first(error)}") from error


def dump_spec(spec: TaskSpec) -> str:
    """The spec as TOML; reading it back gives an equal spec."""
    return tomli_w.dumps(spec.model_dump(mode="json", by_alias=True, exclude_none=True), multiline_strings=True)


def write_text_length(task: Task, max_text_tokens: int | None) -> None:
    """Set `max_text_tokens` in the task's file, and leave everything else in it as it is, remarks too.

    Raises BadTask with the line to write if the file is too unusual for that.
    """
    path = task.folder / TASK_FILE
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    kept = [line for line in lines if not re.match(r"max_text_tokens\s*=", line)]
    said = [] if max_text_tokens is None else [f"max_text_tokens = {max_text_tokens}\n"]
    place = next((n for n, line in enumerate(kept, 1) if re.match(r"(schema_version|kind)\s*=[^\n]*\n", line)), 0)
    text = "".join([*kept[:place], *said, *kept[place:]])
    try:
        wanted = task.spec.model_copy(update={"max_text_tokens": max_text_tokens})
        fits = TaskSpec.model_validate(tomllib.loads(text)) == wanted
    except (tomllib.TOMLDecodeError, ValidationError):
        fits = False
    if not fits:
        raise BadTask(f"{str(path)!r} has changed, or has an unusual form: write there {''.join(said).strip()!r}")
    stat = path.stat()
    write_atomic(path, text)
    # Of which age the examples are is seen by the age of this file.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def dump_records(records: Sequence[ChatRecord]) -> str:
    """The examples as JSON lines, each with its id."""
    return "".join(json.dumps(_as_json(record), ensure_ascii=False) + "\n" for record in records)


def write_task(folder: Path, spec: TaskSpec, splits: Mapping[str, Sequence[ChatRecord]]) -> Task:
    """Write a new task. `task.toml` comes last: a folder without it is no task, and may be deleted."""
    data = folder / DATA_FOLDER
    data.mkdir(parents=True)
    for split in SPLITS:
        write_atomic(data / f"{split}.jsonl", dump_records(splits[split]))
    write_atomic(folder / TASK_FILE, dump_spec(spec))
    return Task(folder, spec)


def _as_json(record: ChatRecord) -> dict[str, object]:
    said = [{"role": message.role, "content": message.content} for message in record.prompt]
    return {"id": record.id, "messages": [*said, {"role": "assistant", "content": record.answer}]}


def _mend_missing(folder: Path, split: str) -> str:
    others = sorted(path.name for path in (folder / DATA_FOLDER).glob("*.json*"))
    there = f" (there: {', '.join(others[:5])})" if others else ""
    return f"{there}. Bring it back, or put examples of the other splits into it as a {split} split"


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [info.alias or name for name, info in TaskSpec.model_fields.items()]
        return f"there is no field {field!r}{did_you_mean(field, known) or '.'} Fields are {', '.join(known)}"
    given = "" if first["type"] in {"missing", "value_error"} else f", got {first['input']!r}"
    return f"{field + ': ' if field else ''}{str(first['msg']).removeprefix('Value error, ')}{given}"


def rows(task: Task) -> Iterator[tuple[str, ChatRecord]]:
    """Every example with the name of its split, train first."""
    for split, records in task.all_records().items():
        yield from ((split, record) for record in records)
