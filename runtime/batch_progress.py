"""A batch's progress on stderr: a bar on a terminal, nothing elsewhere, and one closing line everywhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .batch import BatchCounts, BatchJob
from .batch_output import errors_path


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[BatchCounts], None]]:
    """Draws done, failed, tokens/s and time left; `total` counts lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda counts: None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=total, failed=0, rate=0.0)
        drawn_s = 0.0

        def draw(counts: BatchCounts) -> None:
            nonlocal drawn_s
            if time.monotonic() - drawn_s > 0.1:
                drawn_s = time.monotonic()
                bars.update(task, completed=counts.lines, failed=counts.failed, rate=counts.tokens_per_s)

        yield draw


def summarise(job: BatchJob, counts: BatchCounts, interrupted: bool) -> dict[str, Any]:
    """The run as a JSON object: counts, tokens of this run, seconds, files."""
    return {
        "model": job.model,
        "answered": counts.answered,
        "answered_before": counts.skipped,
        "failed": counts.failed,
        "interrupted": interrupted,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "completion_tokens": counts.completion_tokens,
        "seconds": round(time.monotonic() - counts.started_s, 3),
        "output": str(job.output),
        "errors": str(errors_path(job.output)) if counts.failed else None,
    }


def closing_line(summary: dict[str, Any]) -> str:
    """The run in one line."""
    line = f"{summary['answered']} answered"
    if summary["answered_before"]:
        line += f", {summary['answered_before']} answered before"
    line += f", {summary['failed']} failed"
    if summary["errors"]:
        line += f" (see {summary['errors']})"
    tokens = summary["prompt_tokens"] - summary["cached_tokens"] + summary["completion_tokens"]
    line += f", {tokens} tokens computed in {summary['seconds']:.1f} s"
    return f"interrupted: {line}; the same command goes on from here" if summary["interrupted"] else line
