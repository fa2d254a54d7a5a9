"""A task's folder is read as it was written; one edited by hand says what no longer fits, and how to mend it."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import BadTask
from models.task.check.check import findings_of
from models.task.check.finding import Example
from models.task.task import (
    SPLITS,
    TASK_FILE,
    Task,
    TaskSpec,
    dump_spec,
    open_task,
    read_spec,
    rendered,
    rows,
    task_names,
    text_of,
    write_text_length,
)

EMAIL_TRIAGE = Path(__file__).parents[3] / "models" / "email_triage"
SCHEMA = {"type": "object", "properties": {"name": {"type": ["string", "null"]}}, "required": ["name"]}


@pytest.mark.parametrize(
    "spec",
    [
        TaskSpec(
            kind="classify", labels=("b", "a ü"), scorer="accuracy", prompt='Mail:\n"{input}"\nList:', licence="CC0"
        ),
        TaskSpec(kind="extract", scorer="exact-match", schema=SCHEMA),
        TaskSpec(kind="write", scorer="rouge-l", system="Be short."),
    ],
    ids=lambda spec: spec.kind,
)
def test_a_spec_is_read_back_as_it_was(tmp_path: Path, spec: TaskSpec) -> None:
    (tmp_path / TASK_FILE).write_text(dump_spec(spec), encoding="utf-8")
    assert read_spec(tmp_path / TASK_FILE) == spec
    assert spec.manifest_prompt().wrap("TEXT") == spec.prompt.replace("{input}", "TEXT")


def test_a_task_is_opened_by_name_and_by_path(make: Callable[..., Task]) -> None:
    task = make()
    assert open_task("mails") == task
    assert open_task(str(task.folder)) == open_task(str(task.folder / TASK_FILE)) == task
    assert (task_names(), task.address) == (["mails"], "mails")
    moved = task.folder.rename(task.folder.parent.parent / "a folder")
    assert open_task(str(moved)).address == f"'{moved}'"


def test_the_prompt_stands_around_every_text(make: Callable[..., Task]) -> None:
    task = make(prompt="Sort this mail: {input}!")
    for split in SPLITS:
        bare, asked = task.records(split), rendered(task, split)
        assert [one.prompt[-1].content for one in asked] == [f"Sort this mail: {text_of(one)}!" for one in bare]
        assert [(one.id, one.answer) for one in asked] == [(one.id, one.answer) for one in bare]


def test_packed_splits_are_read(make: Callable[..., Task]) -> None:
    task = make()
    before = task.all_records()
    plain = task.file("train")
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(BadTask, match=r"both train.jsonl and train.jsonl.gz exist; delete one"):
        task.records("train")
    plain.unlink()
    assert task.all_records() == before


EDITS = {
    "no input": ('prompt = "{input}"', 'prompt = "Sort this:"', r"prompt must hold \{input\} exactly once"),
    "twice": ('prompt = "{input}"', 'prompt = "{input} {input}"', r"prompt must hold \{input\} exactly once"),
    "unknown field": ("licence =", "license =", r"no field 'license'; did you mean 'licence'\?"),
    "kind": (
        'kind = "classify"',
        'kind = "sort"',
        r"kind: Input should be 'classify', 'extract' or 'write', got 'sort'",
    ),
    "other kind": ('kind = "classify"', 'kind = "write"', "scorer of kind 'write' is one of rouge-l, exact-match"),
    "no TOML": ("[splits]", "[splits", r"cannot be read: .*line"),
    "seed": ("seed = 0", 'seed = "x"', r"splits.seed: .*integer.*got 'x'"),
    "label twice": ('"billing"', '"delivery"', "labels must be 2 to 255, each once"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_does_not_fit_is_named(make: Callable[..., Task], edit: str) -> None:
    old, new, says = EDITS[edit]
    path = make().folder / TASK_FILE
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(BadTask, match=says):
        open_task("mails")


def test_data_edited_by_hand_name_the_line(make: Callable[..., Task]) -> None:
    task = make()
    path = task.file("validation")
    lines = path.read_text().splitlines()
    wrong = json.loads(lines[1])
    wrong["messages"][-1]["content"] = "biling"
    path.write_text("\n".join([lines[0], json.dumps(wrong), *lines[2:]]))
    with pytest.raises(
        BadTask, match=r"line 2: 'biling' is none of the labels .*did you mean 'billing'\? Correct the line"
    ):
        task.records("validation")
    path.write_text("{\n")
    with pytest.raises(BadTask, match="line 1: not a chat record"):
        task.records("validation")
    path.unlink()
    with pytest.raises(
        BadTask, match=r"validation.jsonl' is missing \(there: test.jsonl, train.jsonl\). Bring it back"
    ):
        task.records("validation")


def test_what_is_no_task(make: Callable[..., Task], tmp_path: Path) -> None:
    make()
    with pytest.raises(BadTask, match=r"there is no task 'mail'; did you mean 'mails'\?"):
        open_task("mail")
    with pytest.raises(BadTask, match=r"is a folder without task.toml"):
        open_task(str(tmp_path))
    with pytest.raises(BadTask, match=r"is a file, not a task; to make one of it: deskside task new NAME"):
        open_task(str(tmp_path / "mails.csv"))
    (tmp_path / TASK_FILE).write_text('kind = "extract"\nscorer = "field-f1"\n[schema]\ntype = "array"\n')
    with pytest.raises(BadTask, match="schema must describe an object"):
        open_task(str(tmp_path))


def test_the_default_models_home_is_a_task() -> None:
    task = open_task(str(EMAIL_TRIAGE))
    sizes = {split: len(task.records(split)) for split in SPLITS}
    assert sizes == {"train": 952, "validation": 296, "test": 343}
    assert {record.answer for _, record in rows(task)} == set(task.spec.labels)


def test_the_synopses_are_a_task_that_writes() -> None:
    task = open_task(str(EMAIL_TRIAGE.with_name("debian_synopsis")))
    assert (task.spec.kind, task.spec.scorer) == ("write", "rouge-l")
    assert [len(task.records(split)) for split in SPLITS] == [2135, 288, 429]


def test_its_mails_are_checked_and_one_is_quoted_in_another_split() -> None:
    task = open_task(str(EMAIL_TRIAGE))
    found = {one.kind: one for one in findings_of(task, [Example(split, one) for split, one in rows(task)])}
    assert not {"conflicts", "duplicates", "few examples", "label variants"} & set(found)
    leaked = found["leakage"].drops
    texts = {(split, one.id): one.prompt[0].content for split, one in rows(task)}
    assert [key.split for key in leaked] == ["train"]
    quoted = texts[leaked[0].split, leaked[0].id].splitlines()[2]
    assert sum(f"> {quoted}" in text for (split, _), text in texts.items() if split == "test") == 1
    assert found["personal data"].n > 0


def test_a_length_is_written_into_the_file_and_taken_out(make: Callable[..., Task]) -> None:
    task = make()
    path = task.folder / TASK_FILE
    path.write_text("# kept as it is\n" + path.read_text())
    os.utime(path, (5, 5))
    before = path.read_text()
    write_text_length(task, 128)
    assert read_spec(path) == task.spec.model_copy(update={"max_text_tokens": 128})
    assert read_spec(path).manifest_prompt().max_text_tokens == 128
    assert path.stat().st_mtime == 5, "the age of the file says whether a table has changed since"
    write_text_length(task, 64)
    assert path.read_text() == before.replace("schema_version = 1\n", "schema_version = 1\nmax_text_tokens = 64\n")
    write_text_length(task, None)
    assert path.read_text() == before


def test_a_file_that_has_changed_meanwhile_is_left_alone(make: Callable[..., Task]) -> None:
    task = make()
    path = task.folder / TASK_FILE
    path.write_text(path.read_text().replace("{input}", "Sort: {input}"))
    before = path.read_text()
    with pytest.raises(BadTask, match="write there 'max_text_tokens = 128'"):
        write_text_length(task, 128)
    assert path.read_text() == before
