"""The memory of a process and of all that it started, as sampled while it runs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.load.servers import PROC, SAMPLE_S, PeakWatch, proportional_bytes, resident_bytes, tree_bytes

MIB = 1 << 20
HOLD = "import sys; held = bytearray(%d << 20); print('ready', flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {HOLD % 60!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
held = bytearray(40 << 20)
print("ready", flush=True)
sys.stdin.read()
child.communicate()
"""

pytestmark = pytest.mark.skipif(not (PROC / "self" / "smaps_rollup").exists(), reason="this system has no /proc")


def start(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_process_counts_with_its_children_at_one_time() -> None:
    with start(PARENT) as process:
        assert process.stdout is not None
        with PeakWatch(process.pid) as watch:
            process.stdout.readline()
            together = tree_bytes(process.pid)
            deadline = time.monotonic() + 30
            while watch.peak_bytes < together and time.monotonic() < deadline:
                time.sleep(SAMPLE_S)  # the next sample sees what this one saw
            process.communicate()
    assert 100 * MIB < together < 200 * MIB
    assert watch.peak_bytes >= together
    assert tree_bytes(process.pid) == 0, "it is gone"


def test_pages_that_two_processes_share_count_once(tmp_path: Path) -> None:
    (tmp_path / "shared").write_bytes(bytes(64 * MIB))
    code = f"""
import mmap, sys
with open({str(tmp_path / "shared")!r}, "rb") as file:
    held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(held[at] for at in range(0, len(held), 4096))
print("ready", flush=True)
sys.stdin.read()
"""
    with start(code) as one, start(code) as other:
        for process in (one, other):
            assert process.stdout is not None
            process.stdout.readline()
        resident = [resident_bytes(process.pid) for process in (one, other)]
        shared = [proportional_bytes(process.pid) for process in (one, other)]
        one.communicate()
        other.communicate()
    assert min(resident) > 64 * MIB
    assert 64 * MIB < sum(shared) < 64 * MIB + 2 * 20 * MIB
