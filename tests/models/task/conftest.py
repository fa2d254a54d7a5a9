"""Every test has a home of its own, and a task may be made in one call."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from models.task.new import NewTask, make_task
from models.task.task import Task
from tests.support.models.tasks import csv_file, rows

Make = Callable[..., Task]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(pairs: Sequence[tuple[str, str]] | None = None, name: str = "mails", **wanted: object) -> Task:
        path = csv_file(tmp_path, pairs if pairs is not None else rows(), f"{name}.csv")
        return make_task(NewTask(name, path, **wanted)).task  # type: ignore[arg-type]

    return made
