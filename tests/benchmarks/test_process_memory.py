"""The memory of a process and of all that it started, as sampled while it runs."""

import subprocess
import sys
import time

import pytest

from benchmarks.process_memory import PROC, SAMPLE_S, PeakWatch, tree_bytes

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

pytestmark = pytest.mark.skipif(not (PROC / "self" / "statm").exists(), reason="this system has no /proc")


def test_a_process_counts_with_its_children_at_one_time() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
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
