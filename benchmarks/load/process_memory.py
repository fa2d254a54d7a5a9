"""The memory of processes as /proc tells it: of one, and of one with all that it started."""

import os
import threading
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")
SAMPLE_S = 0.02  # the kernel walks the page tables for each


def resident_bytes(pid: int, proc: Path = PROC) -> int:
    """The resident memory of a process; 0 when it is gone or the system has no /proc."""
    try:
        fields = (proc / str(pid) / "statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pid: int, proc: Path = PROC) -> list[int]:
    """The processes whose parent is `pid`, of every thread of it."""
    found = []
    for tasks in (proc / str(pid)).glob("task/*/children"):
        try:
            found += [int(word) for word in tasks.read_text(encoding="ascii").split()]
        except OSError:
            continue
    return sorted(found)


def own_bytes(pid: int, proc: Path = PROC) -> int:
    """A process's share of the resident memory (PSS): a page that n processes have counts for an n-th.

    0 when it is gone or the system does not tell.
    """
    try:
        lines = (proc / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def tree_bytes(pid: int, proc: Path = PROC) -> int:
    """The resident memory of a process and its descendants, what they share counted once."""
    return own_bytes(pid, proc) + sum(tree_bytes(child, proc) for child in children(pid, proc))


class PeakWatch:
    """Looks at a process and its descendants every SAMPLE_S seconds while its block runs.

    `peak_bytes` is the most they held together at one time; 0 where there is no /proc.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))
