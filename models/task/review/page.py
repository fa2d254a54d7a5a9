"""The review page: one HTML file with the suspicious examples in it, which asks nothing of any network."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from models.common.chat_records import ChatRecord
from models.common.files import write_atomic
from models.task.check.finding import RowKey, Suspicion
from models.task.task import Task

from .decisions import digest_of, kept

TEMPLATE = "page.html"
DATA_MARK = "__DATA__"
PAGE_FILE = "review.html"


def to_review(task: Task, suspicious: Sequence[Suspicion]) -> list[dict[str, object]]:
    """The rows of the page, most suspicious first; those that were kept before are left out."""
    records = {RowKey(split=split, id=one.id): one for split, rows in task.all_records().items() for one in rows}
    settled = kept(task)
    return [_row(one, records) for one in suspicious if (digest_of(records[one.key]), one.label) not in settled]


def write_page(task: Task, suspicious: Sequence[Suspicion], path: Path) -> int:
    """Write the page, and return the number of its rows."""
    rows = to_review(task, suspicious)
    data = {
        "task": task.name,
        "command": f"deskside task apply {task.address}",
        "labels": task.spec.labels,
        "rows": rows,
    }
    # A text that holds a closing script tag stays a text.
    inlined = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    template = files("models.task.review").joinpath(TEMPLATE).read_text(encoding="utf-8")
    write_atomic(path, template.replace(DATA_MARK, inlined.replace("\u2029", "\\u2029")))
    return len(rows)


def _row(one: Suspicion, records: Mapping[RowKey, ChatRecord]) -> dict[str, object]:
    record = records[one.key]
    return {
        "split": one.key.split,
        "id": one.key.id,
        "line": record.line,
        "digest": digest_of(record),
        "text": one.text,
        "label": one.label,
        "suggested": one.suggested,
        "confidence": one.confidence,
    }
