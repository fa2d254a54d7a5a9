"""Which rows of logits are compared: those that the answers are drawn from.

They are the rows after the prompt's last token, and after each token of the expected answer. What a row says of a
prompt's own next word is never served, and a fine-tune on answers has not learnt it.

A row is as wide as the vocabulary, so their number is bounded: every example gives as many as an even share allows,
evenly spread, and its first one always.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .measure_tasks import Tasks

MAX_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """The logits after token `position` of task `place`, where token `target` comes next. `number` is its place on
    disk.
    """

    number: int
    place: int
    position: int
    target: int


def plan_rows(tasks: Tasks, max_rows: int = MAX_ROWS) -> tuple[Row, ...]:
    """The rows to compare, numbered in order, example by example; each has one at least, whatever the limit."""
    share = max(1, even_share([len(task.answer) for task in tasks.tasks], max_rows))
    rows: list[Row] = []
    for place, task in enumerate(tasks.tasks):
        last = len(task.prompt) - 1
        rows += [
            Row(len(rows) + number, place, last + step, task.answer[step])
            for number, step in enumerate(spread(len(task.answer), share))
        ]
    return tuple(rows)


def even_share(counts: Sequence[int], limit: int) -> int:
    """The largest share for which the sum of min(count, share) is at most `limit`."""
    share, left = 0, sorted(counts)
    while left and limit >= len(left) * (left[0] - share):
        limit -= len(left) * (left[0] - share)
        share = left.pop(0)
    return share + (limit // len(left) if left else 0)


def spread(count: int, share: int) -> list[int]:
    """At most `share` of 0 … count - 1, evenly spread, 0 among them."""
    if count <= 0:
        return []
    return sorted({int(step) for step in np.linspace(0, count - 1, min(count, share))})


def rows_in_common(rows: Sequence[Row], theirs: Tasks, ours: Tasks, kept: np.ndarray | None) -> Iterator[Row]:
    """Those of the reference's `rows` that a candidate has too, which tokenised the same examples as `ours`.

    `kept` maps the candidate's token ids to the reference's; None: they are the same. A row is common where all tokens
    up to its target are.
    """
    at = {task.id: place for place, task in enumerate(ours.tasks)}
    tokens = [np.asarray(task.tokens, np.int64) for task in ours.tasks]
    mapped = tokens if kept is None else [kept[ids] for ids in tokens]
    for row in rows:
        task = theirs.tasks[row.place]
        place = at.get(task.id)
        if place is None:
            continue
        wanted = np.asarray(task.tokens[: row.position + 2])
        if np.array_equal(mapped[place][: row.position + 2], wanted):
            yield Row(row.number, place, row.position, int(tokens[place][row.position + 1]))
