"""Memory of a process and of its descendants: sizes from psutil, the process tree from /proc."""

import threading
from pathlib import Path
from types import TracebackType

import psutil

PROC = Path("/proc")
SAMPLE_S = 0.02  # the kernel walks the page tables for each sample


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def children(pid: int) -> list[int]:
    """The processes that any thread of `pid` started; none when it has ended or the system has no /proc.

    The kernel lists them per thread. psutil reads every process of the system instead, which at 50 samples a second
    would disturb the measured times.
    """
    found = []
    for listing in (PROC / str(pid)).glob("task/*/children"):
        try:
            found += [int(word) for word in listing.read_text(encoding="ascii").split()]
        except OSError:
            continue
    return sorted(found)


def proportional_bytes(pid: int) -> int:
    """The proportional set size (PSS) of a process: a page that n processes share counts as an n-th.

    0 when it has ended or the system does not report it (Linux does).
    """
    try:
        return int(getattr(psutil.Process(pid).memory_full_info(), "pss", 0))
    except psutil.Error:
        return 0


def tree_bytes(pid: int) -> int:
    """The memory of a process and its descendants, shared pages counted once."""
    return proportional_bytes(pid) + sum(tree_bytes(child) for child in children(pid))


class PeakWatch:
    """Sample a process and its descendants every SAMPLE_S seconds while its block runs.

    `peak_bytes` is their largest total at one time; 0 where the system reports no PSS.
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
