"""What a batch says of itself: nothing while it runs unless on a terminal, one line and one object at the end."""

from pathlib import Path

import pytest

from runtime.batch.run import BatchCounts, BatchJob, closing_line, progress_bar, summarise

JOB = BatchJob(Path("in.jsonl"), Path("out.jsonl"), "m", "0", 4)


def counts(**changes: int) -> BatchCounts:
    return BatchCounts(answered=7, prompt_tokens=100, cached_tokens=30, completion_tokens=10, **changes)


def test_the_summary_counts_what_was_computed() -> None:
    summary = summarise(JOB, counts(skipped=2, failed=1), interrupted=False)
    assert summary["answered"] == 7
    assert summary["errors"] == "out.errors.jsonl"
    line = closing_line(summary)
    assert line.startswith("7 answered, 2 answered before, 1 failed (see out.errors.jsonl), 80 tokens computed in ")


def test_without_failures_there_is_no_errors_file_to_see() -> None:
    summary = summarise(JOB, counts(), interrupted=False)
    assert summary["errors"] is None
    assert closing_line(summary).startswith("7 answered, 0 failed, 80 tokens")


def test_an_interrupted_run_says_how_to_go_on() -> None:
    line = closing_line(summarise(JOB, counts(), interrupted=True))
    assert line.startswith("interrupted: ")
    assert line.endswith("rerun the same command to resume")


def test_no_bar_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10) as draw:
        draw(counts())
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_what_is_done_and_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(10) as draw:
        draw(counts(failed=1))
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/10" in err
    assert "1 failed" in err
    assert "tokens/s" in err
