"""The calibration of a chosen file: which examples it reads, and what it records."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import convert.selection.confidence as confidence
from convert.measure.compare import MeasureResult
from convert.measure.examples import split_examples
from convert.measure.forward import ModelAnswer
from convert.measure.tasks import EvalTask, Tasks
from convert.planning.inputs import Examples, Inputs
from convert.selection.confidence import calibration_of
from models.common.chat_records import ChatMessage, ChatRecord
from models.common.console import LineReporter
from models.manifest import Manifest
from models.quality import LossBudget

LABELS = ("a", "b")
RECORDS = tuple(ChatRecord(str(n), n + 1, (ChatMessage("user", f"text {n}"),), LABELS[n % 2]) for n in range(40))
N_IN_MATRIX = 6


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    examples = Examples(tmp_path / "mails.jsonl", "e" * 64, split_examples(RECORDS), LABELS, "classify", LossBudget())
    manifest = Manifest(name="toy", licence="none", task="classify", labels=LABELS)
    return Inputs(None, None, None, manifest, examples)  # type: ignore[arg-type]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the examples that were scored; the model answers all of them right."""
    read: list[str] = []

    def tasks_of(gguf: Path, records: Any, *_: object) -> Tasks:
        tasks = tuple(EvalTask(one.id, (1,), (2,), one.answer) for one in records)
        return Tasks("classify", tasks, LABELS, ((2,), (3,)), (1,), 10)

    def run_job(job: Any, *_: object) -> MeasureResult:
        read.extend(task.id for task in job.tasks.tasks)
        rows = ((-0.1, -5.0) if task.expected == "a" else (-5.0, -0.1) for task in job.tasks.tasks)
        return MeasureResult(tuple(ModelAnswer("a", logprobs=row) for row in rows), ())

    monkeypatch.setattr(confidence, "tasks_of", tasks_of)
    monkeypatch.setattr(confidence, "run_job", run_job)
    return read


def test_no_example_of_the_importance_matrix_calibrates(inputs: Inputs, read: list[str], tmp_path: Path) -> None:
    gguf = tmp_path / "toy.gguf"
    gguf.write_bytes(b"weights")
    made = calibration_of(gguf, N_IN_MATRIX, inputs, tmp_path / "measured", LineReporter())
    assert made is not None
    assert inputs.examples is not None
    in_matrix = {record.id for record in inputs.examples.split.calibration[:N_IN_MATRIX]}
    assert set(read) == {record.id for record in RECORDS} - in_matrix
    assert (made.examples, made.right, made.source) == (len(RECORDS) - N_IN_MATRIX,) * 2 + ("mails.jsonl",)
    assert [promise.target for promise in made.promises] == [0.95, 0.97, 0.99]
    assert all(promise.threshold is None and promise.needed for promise in made.promises), "34 prove nothing"
    assert calibration_of(gguf, N_IN_MATRIX, inputs, tmp_path / "measured", LineReporter()) == made
    assert len(read) == made.examples, "a second run measures nothing"


def test_the_targets_asked_for_are_recorded_and_the_first_applies(
    inputs: Inputs, read: list[str], tmp_path: Path
) -> None:
    gguf = tmp_path / "toy.gguf"
    gguf.write_bytes(b"weights")
    asked = replace(inputs, targets=(0.8, 0.6))
    made = calibration_of(gguf, 0, asked, tmp_path / "measured", LineReporter())
    assert made is not None
    assert made.target == 0.8
    assert [(one.target, one.threshold is not None) for one in made.promises] == [(0.8, True), (0.6, True)]


def test_work_to_write_and_too_few_examples_have_no_calibration(
    inputs: Inputs, read: list[str], tmp_path: Path
) -> None:
    assert inputs.examples is not None
    written = replace(inputs, examples=replace(inputs.examples, work="write", labels=()))
    assert calibration_of(tmp_path / "x", 0, written, tmp_path, LineReporter()) is None
    assert calibration_of(tmp_path / "x", 0, replace(inputs, examples=None), tmp_path, LineReporter()) is None
    assert read == []
