"""How a conversion says where it is: stages with a measure, and warnings. Shown on stderr; stdout is for data."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text


class Reporter(Protocol):
    """What the pipeline tells its caller."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins (and the one before it is done); `total` is what `advance` counts up to, if known."""

    def advance(self, done: int, total: int | None = None) -> None:
        """The stage has done `done` in all; `total` when it is known only now."""

    def note(self, message: str) -> None:
        """Something that was found to be as it should be."""

    def warn(self, message: str) -> None:
        """Something the user should know; the conversion goes on."""

    def close(self) -> None:
        """The last stage is over, well or not."""


def reporter() -> Reporter:
    """Bars on a terminal, one line per stage otherwise."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


class LineReporter:
    """One line per stage, for logs."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Print the stage's name."""
        print(f"{name} …", file=sys.stderr, flush=True)

    def advance(self, done: int, total: int | None = None) -> None:
        """A log needs no steps."""

    def note(self, message: str) -> None:
        """Print the note."""
        print(f"  {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Print the warning."""
        print(f"warning: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class BarReporter:
    """A bar per stage; finished ones stay with their time."""

    def __init__(self) -> None:
        self._progress = Bars(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)
        )
        self._task: TaskID | None = None
        self._shown_s = 0.0
        self._progress.start()

    def stage(self, name: str, total: int | None = None) -> None:
        """Start a bar."""
        self._finish()
        self._task = self._progress.add_task(name, total=total)

    def advance(self, done: int, total: int | None = None) -> None:
        """Move the bar, at most ten times a second."""
        now_s = time.monotonic()
        if self._task is not None and now_s - self._shown_s > 0.1:
            self._shown_s = now_s
            self._progress.update(self._task, completed=done, total=total)

    def note(self, message: str) -> None:
        """Print the note above the bars."""
        self._progress.console.print(Text(f"  {message}"))

    def warn(self, message: str) -> None:
        """Print the warning above the bars."""
        self._progress.console.print(Text.assemble(("warning: ", "bold yellow"), message))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._finish()
        self._progress.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = self._progress.tasks[self._task].total or 1
            self._progress.update(self._task, total=total, completed=total)


Progress = Callable[[str, int, int], None]


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A bar on stderr when it is a terminal, else one line for each thing that is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_whole
        return
    with Bars(console=console) as bars:
        tasks = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield show


def _print_whole(what: str, done: int, total: int) -> None:
    if done in (0, total):
        print(what if done == 0 else f"{what}: {done} of {total}", file=sys.stderr)
