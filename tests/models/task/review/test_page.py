"""The page carries its rows, asks for nothing, and is not broken by what a text holds."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from models.task.check.check import check_task
from models.task.review.decisions import apply_decisions, decision
from models.task.review.page import to_review, write_page
from models.task.task import Task
from models.task.task import rows as all_rows
from tests.support.models.tasks import rows

HOSTILE = "</script><script>alert(1)</script><img src=//example.org/x> \u2028 &amp;"


@pytest.fixture
def task(make: Callable[..., Task]) -> Task:
    pairs = rows(120)
    pairs[7] = (f"{pairs[7][0]} {HOSTILE}", "returns")
    return make(pairs)


def test_the_page_holds_the_suspicious_rows(task: Task, tmp_path: Path) -> None:
    report = check_task(task)
    n_rows = write_page(task, report.suspicious, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    inlined = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert inlined is not None
    data = json.loads(inlined[1])
    assert n_rows == len(data["rows"]) == len(report.suspicious) > 0
    assert data["rows"][0]["text"].endswith(HOSTILE)
    assert data["labels"] == list(task.spec.labels)
    assert data["command"] == "deskside task apply mails"
    assert page.count("<script") == page.count("</script>") == 2


def test_the_page_asks_for_nothing(task: Task, tmp_path: Path) -> None:
    write_page(task, (), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|//\w+\.|\bsrc=|<link|@import|fetch\(|XMLHttpRequest", page)


def test_what_was_kept_is_not_shown_again(task: Task) -> None:
    report = check_task(task)
    first = report.suspicious[0]
    record = next(one for split, one in all_rows(task) if (split, one.id) == (first.key.split, first.key.id))
    apply_decisions(task, [decision(first.key.split, record, "keep")])
    shown = [(row["split"], row["id"]) for row in to_review(task, report.suspicious)]
    assert (first.key.split, first.key.id) not in shown
    assert len(shown) == len(report.suspicious) - 1
