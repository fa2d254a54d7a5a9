"""Answers outlive a kill, a torn line and another question; nothing that was paid for is dropped."""

import json
from pathlib import Path

import pytest

from benchmarks.errors import BadRecord
from benchmarks.record import now_text, this_machine
from benchmarks.ways.record import KeptAnswers, WayAnswer, WayComparison, WayRecord, load_comparison


def answer(number: int) -> WayAnswer:
    return WayAnswer(id=str(number), label="a", answer="b", asked=f"h{number}", took_s=0.25)


def comparison(*ways: WayRecord) -> WayComparison:
    return WayComparison(
        started_at=now_text(),
        command=("deskside",),
        machine=this_machine(),
        task="t",
        task_kind="classify",
        sha256={},
        labels=("a", "b"),
        n_test=3,
        n_validation=0,
        quick=False,
        ways=ways,
    )


def test_answers_are_read_back_without_the_torn_line(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run.json"
    kept = KeptAnswers(out)
    for number in range(3):
        kept.add("few-shot", "model", "test", answer(number))
    journal = out.with_name("run.json.journal")
    journal.write_bytes(journal.read_bytes()[:-20])
    again = KeptAnswers(out)
    assert again.of("few-shot", "model", "test") == {"0": answer(0), "1": answer(1)}
    assert again.of("few-shot", "model", "again") == {}
    assert again.others("few-shot", "another") == 2


def test_a_line_that_is_no_answer_is_refused_by_its_number(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "run.json")
    for number in range(3):
        kept.add("w", "m", "test", answer(number))
    journal = tmp_path / "run.json.journal"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], '{"way": 1}', *lines[1:]]) + "\n")
    with pytest.raises(BadRecord, match="line 2, is no answer"):
        KeptAnswers(tmp_path / "run.json")


def test_a_result_keeps_what_it_does_not_count(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    kept = KeptAnswers(out)
    kept.add("hosted", "dear", "test", answer(0))
    kept.add("few-shot", "m", "test", answer(1))
    kept.add("few-shot", "m", "test", answer(2))
    counted = WayRecord(name="few-shot", how="", identity="m", answers={"test": (answer(1),)})
    kept.save(comparison(counted))
    assert not out.with_name("run.json.journal").exists()
    assert load_comparison(out).ways == (counted,)
    for _ in range(2):
        again = KeptAnswers(out)
        assert again.of("hosted", "dear", "test") == {"0": answer(0)}
        assert again.of("few-shot", "m", "test") == {"1": answer(1), "2": answer(2)}
        again.save(comparison())


def test_another_file_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    out.write_text(json.dumps({"mine": 1}))
    with pytest.raises(BadRecord, match="is not a comparison of ways"):
        KeptAnswers(out)
    assert json.loads(out.read_text()) == {"mine": 1}
