"""This machine in a few words: figures of speed say where they were measured."""

import ctypes
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def describe_machine(backend: str = "", root: Path = Path("/")) -> str:
    """Processor, logical cores, system, and what llama.cpp runs on (`backend`). `root` stands in for `/` in tests."""
    parts = [_cpu(root), f"{os.cpu_count() or 1} logical cores", f"{platform.system()} {platform.machine()}"]
    return ", ".join([*parts, backend] if backend else parts)


def _cpu(root: Path) -> str:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    if not named and sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        named = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return named or platform.processor() or "an unknown processor"


@contextmanager
def many_objects() -> Iterator[None]:
    """Around a function that makes very many objects and keeps few: faster, and their memory is free afterwards."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        give_back_freed()


def give_back_freed() -> None:
    """Hand the memory that has been freed back to the system, as far as the C library can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
