"""Progress and messages on stderr; stdout is for data.

`ProgressBars` draws every bar that Deskside shows. A long function takes a callback and calls it with what is done and
the total: `Progress` for one task (see `files`), `NamedProgress` for several.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

REDRAW_S = 0.1

NamedProgress = Callable[[str, int, int], None]
"""Called with a task's name, the amount done so far and the total."""


def page(*, stderr: bool = False) -> Console:
    """A console for reports: texts wrap at the terminal's width, at 80 columns where there is none."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


class ProgressBars:
    """One bar for each task, moved at most ten times a second. `draws` None: only where stderr is a terminal.

    `columns` are rich's; without any, its default ones. A `transient` bar disappears at the end.
    """

    def __init__(self, *columns: str | ProgressColumn, draws: bool | None = None, transient: bool = False) -> None:
        self._console = Console(stderr=True)
        self.draws = self._console.is_terminal if draws is None else draws
        self._bars = Bars(*columns, console=self._console, transient=transient, disable=not self.draws)
        self._tasks: dict[str, TaskID] = {}
        self._redraw_at_s: dict[str, float] = {}

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, name: str, total: int | None = None, **fields: Any) -> None:
        """Add a bar; `fields` are its values for `columns`."""
        self._tasks[name] = self._bars.add_task(name, total=total, **fields)
        self._redraw_at_s[name] = 0.0

    def update(self, name: str, done: int, total: int | None = None, **fields: Any) -> None:
        """Move the bar `name`, added here if it is new. `total` None keeps the one known before."""
        if name not in self._tasks:
            self.start(name, total)
        now_s = time.monotonic()
        if now_s >= self._redraw_at_s[name] or done == total:
            self._redraw_at_s[name] = now_s + REDRAW_S
            self._bars.update(self._tasks[name], completed=done, total=total, **fields)

    def finish(self, name: str) -> None:
        """Show the bar `name` as full."""
        total = self._bars.tasks[self._tasks[name]].total or 1
        self._bars.update(self._tasks[name], total=total, completed=total)

    def print(self, message: RenderableType) -> None:
        """Print above the bars."""
        self._console.print(message)


@contextmanager
def show_progress() -> Iterator[NamedProgress]:
    """A bar for each task where stderr is a terminal, else a line at its start and at its end."""
    with ProgressBars() as bars:
        yield bars.update if bars.draws else _print_ends


def _print_ends(name: str, done: int, total: int) -> None:
    if done in (0, total):
        print(name if done == 0 else f"{name}: {done} of {total}", file=sys.stderr)


class Reporter(Protocol):
    """Reports on a conversion: one stage after the other, and messages."""

    def stage(self, name: str, total: int | None = None) -> None:
        """End the stage before and begin the next. `total` is what `advance` counts up to, if known."""

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Report how much of the stage is done; `total` when it is known only now. `detail` is shown with its name."""

    def note(self, message: str) -> None:
        """Report a check that passed."""

    def warn(self, message: str) -> None:
        """Report something the user should know; the conversion continues."""

    def close(self) -> None:
        """End the last stage, finished or not."""


def reporter() -> Reporter:
    """Bars on a terminal, else one line per stage."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


class LineReporter:
    """One line per stage, for logs."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Print the stage's name."""
        print(f"{name} …", file=sys.stderr, flush=True)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Print nothing: a log needs no steps."""

    def note(self, message: str) -> None:
        """Print the note."""
        print(f"  {message}", file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Print the warning."""
        print(f"warning: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class BarReporter:
    """A bar per stage; finished ones stay, with their time."""

    def __init__(self) -> None:
        self._bars = ProgressBars(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), draws=True)
        self._stage: str | None = None
        self._bars.__enter__()

    def stage(self, name: str, total: int | None = None) -> None:
        """Start a bar."""
        self._finish()
        self._stage = name
        self._bars.start(name, total)

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Move the bar."""
        if self._stage is not None:
            shown = {"description": f"{self._stage}: {detail}"} if detail else {}
            self._bars.update(self._stage, done, total, **shown)

    def note(self, message: str) -> None:
        """Print the note above the bars."""
        self._bars.print(Text(f"  {message}"))

    def warn(self, message: str) -> None:
        """Print the warning above the bars."""
        self._bars.print(Text.assemble(("warning: ", "bold yellow"), message))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._finish()
        self._bars.__exit__(None, None, None)

    def _finish(self) -> None:
        if self._stage is not None:
            self._bars.finish(self._stage)
