"""The inputs of a conversion by a task: its validation split, kind, labels and prompt."""

from pathlib import Path
from typing import Any

import pytest

from convert.errors import RequestInvalid
from convert.planning.inputs import Inputs, gather
from convert.planning.request import ConvertRequest
from models.errors import BadExamples, BadTask
from models.manifest import Prompt
from models.store.store import Store
from models.task.new import NewTask, make_task
from models.task.task import Task
from tests.convert.test_pipeline import Notes
from tests.support.convert.tiny import write_model
from tests.support.models.tasks import csv_file, rows

TEXTS = ["mail client", "image editor"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def gathered(tmp_path: Path, home: Path) -> Any:
    """Gather the inputs of a tiny model for the task `mine`."""

    def made(**more: Any) -> Inputs:
        source = str(write_model(tmp_path / "base.gguf"))
        return gather(ConvertRequest(source=source, name="tiny", task="mine", **more), Store(home), Notes())

    return made


def task_of(folder: Path, n: int = 200, answers: list[str] | None = None, **wanted: Any) -> Task:
    pairs = [(text, answers[i % len(answers)] if answers else label) for i, (text, label) in enumerate(rows(n))]
    return make_task(NewTask("mine", csv_file(folder, pairs, "mine.csv"), **wanted)).task


def test_a_task_gives_its_validation_split_kind_labels_and_prompt(tmp_path: Path, gathered: Any) -> None:
    task = task_of(tmp_path, prompt="Sort: {input}")
    found = gathered()
    assert found.examples.path == task.file("validation")
    assert {one.id for one in found.examples.records} == {one.id for one in task.records("validation")}
    assert (found.examples.work, found.examples.labels) == ("classify", task.spec.labels)
    assert (found.manifest.task, found.manifest.labels) == ("classify", task.spec.labels)
    assert found.manifest.prompt == Prompt(template="Sort: {text}")
    assert found.quantization is None, "the examples decide"


def test_answers_that_repeat_are_texts_where_the_task_says_so(tmp_path: Path, gathered: Any) -> None:
    task_of(tmp_path, answers=TEXTS, kind="write")
    found = gathered()
    assert (found.examples.work, found.manifest.task, found.manifest.labels) == ("write", "write", ())


def test_a_label_without_a_validation_example_is_a_label(tmp_path: Path, gathered: Any) -> None:
    task = task_of(tmp_path)
    file = task.file("validation")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if task.spec.labels[0] not in line))
    found = gathered()
    assert found.examples.labels == found.manifest.labels == task.spec.labels


def test_what_cannot_be_measured_is_refused(tmp_path: Path, gathered: Any) -> None:
    with pytest.raises(BadTask, match="there is no task 'mine'"):
        gathered()
    task = task_of(tmp_path, 60)
    with pytest.raises(RequestInvalid, match="--task mine has examples of its own: leave out --examples, or --task"):
        gathered(examples=task.file("test"))
    with pytest.raises(BadExamples, match="at least 20 are needed"):
        gathered()
