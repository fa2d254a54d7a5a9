"""Garbage collection resumes after the block, errors included, and freed memory returns to the system."""

import gc
import platform
import subprocess
import sys

import pytest

from models.common.machine import gc_paused

_FREES_BETWEEN_KEPT = """
import sys
from pathlib import Path
from models.common.machine import give_back_freed

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [bytes(100_000) for _ in range(1000)]  # too small to be mapped one by one
del blocks[:-1]
before = resident_bytes()
give_back_freed()
print(before - resident_bytes())
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_restored(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with gc_paused():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(KeyError), gc_paused():
            raise KeyError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_returns_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FREES_BETWEEN_KEPT], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 50 << 20
