"""Progress on stderr: bars for a person, one line for each finished thing for a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A bar on stderr when it is a terminal, else one line for each thing that is done."""
    from rich.console import Console
    from rich.progress import Progress as Bars

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
