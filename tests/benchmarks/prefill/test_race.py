"""The report of `deskside bench prefill`: ratios of medians from raw seconds, and the child's failure."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.errors import ServerFailed
from benchmarks.prefill.race import STEPS, PrefillRun, PrefillSettings, lines, prefill_command, ratios
from benchmarks.record import this_machine


def a_run() -> PrefillRun:
    seconds = {name: {"stock": [4.0, 2.0, 30.0], "own": [2.0, 1.0, 9.0]} for name in STEPS}
    return PrefillRun(
        started_at="2026-01-01T00:00:00+00:00",
        machine=this_machine(),
        backend="CPU (AVX2, FMA), prompts by Deskside",
        threads=2,
        model="model.gguf",
        size_bytes=7,
        repetitions=3,
        seconds=seconds,
    )


def test_ratios_are_of_medians() -> None:
    assert ratios(a_run()) == dict.fromkeys(STEPS, 2.0)


def test_the_report_names_how_it_was_measured_in_80_columns() -> None:
    report = lines(a_run())
    assert report[0] == " 2.00 times as fast: one prompt of 110 tokens"
    assert "model.gguf, 3 repetitions in turns, medians, 2 threads" in report
    assert max(map(len, report)) <= 80


def test_a_child_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nLoadFailed: no compiler\n")
    monkeypatch.setattr("benchmarks.prefill.race.subprocess.run", lambda *_, **__: failed)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    settings = PrefillSettings(model=str(tmp_path / "model.gguf"), out=tmp_path / "out.json")
    with pytest.raises(ServerFailed, match="no compiler"):
        prefill_command.__wrapped__(settings)  # type: ignore[attr-defined]
    assert not (tmp_path / "out.json").exists()
