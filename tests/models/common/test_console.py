"""Progress goes to stderr: bars on a terminal, lines or nothing elsewhere."""

import pytest

from models.common import console
from models.common.console import ProgressBars, show_progress


def test_without_a_terminal_a_task_is_a_line_at_each_end(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        for done in range(4):
            progress("load", done, 3)
    assert capsys.readouterr() == ("", "load\nload: 3 of 3\n")


def test_without_a_terminal_no_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars:
        bars.update("pull", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_moves_ten_times_a_second_and_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    now_s = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now_s)  # type: ignore[attr-defined]
    with ProgressBars("{task.description} {task.completed}", draws=True) as bars:
        bars.update("pull", 1, 10)
        bars.update("pull", 2, 10)
        bars.update("hash", 7, 7)
        bars.update("hash", 6, 7)
        bars.print("a note")
    err = capsys.readouterr().err
    assert "a note" in err
    assert "pull 1" in err
    assert "hash 7" in err
