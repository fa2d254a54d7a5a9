"""This machine in a few words: figures of speed say where they were measured."""

import os
import platform
import subprocess
import sys
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
