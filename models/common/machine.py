"""The machine that this process runs on: its processor, cores, memory and load, container limits included.

Figures of speed name the machine they were measured on. Tests pass another `root` than `/`.
"""

import ctypes
import gc
import mmap
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import numpy as np

ROOT = Path("/")
# Share of the available memory for models; the rest is left to other programs.
USABLE_SHARE = 0.9
# Above this share the machine counts as busy, and what is timed on it as uncertain.
BUSY_SHARE = 0.25
# Smaller arrays come from the heap: a process may have 65,530 mappings.
MAPPED_BYTES = 1 << 16


def describe_machine(backend: str = "", root: Path = ROOT) -> str:
    """Processor, logical cores, system and llama.cpp's `backend`, in one line."""
    parts = [describe_cpu(root), f"{logical_cores()} logical cores", f"{platform.system()} {platform.machine()}"]
    return ", ".join([*parts, backend] if backend else parts)


def describe_cpu(root: Path = ROOT) -> str:
    """The processor's model name."""
    lines = _lines(root / "proc/cpuinfo")
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown processor"


def processor_kind(root: Path = ROOT) -> str:
    """The widest vectors of an x86 processor: AMX, AVX-512 or AVX2; empty for others."""
    return next((vector_kind(line) for line in _lines(root / "proc/cpuinfo") if line.startswith("flags")), "")


def vector_kind(features: str) -> str:
    """The same of the features in a text: the processor's flags, or those that llama.cpp was built for."""
    marks = (("AMX_INT8", "AMX"), ("AVX512", "AVX-512"), ("AVX2", "AVX2"))
    return next((kind for mark, kind in marks if mark in features.upper()), "")


def logical_cores() -> int:
    """Logical cores of the whole machine."""
    return os.cpu_count() or 1


def physical_cores(root: Path = ROOT) -> int:
    """Physical cores this process may use: hyper-threads counted once, affinity and container quota respected.

    On a Mac the performance cores alone. llama.cpp gains nothing from a second thread on the same core.
    """
    if sys.platform == "darwin":
        performance = _sysctl("hw.perflevel0.physicalcpu")
        return int(performance) if performance.isdigit() else psutil.cpu_count(logical=False) or logical_cores()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(logical_cores())
    topology = root / "sys/devices/system/cpu"
    cores = {_first_line(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quota = _cpu_quota(root / "sys/fs/cgroup")
    return max(1, min(len(cores), quota) if quota else len(cores))


def busy_share(seconds: float = 0.3) -> float:
    """The share of the processors' time that is in use during the next `seconds`, in which the caller does nothing."""
    return float(psutil.cpu_percent(interval=seconds)) / 100


def load_average() -> float | None:
    """The 1-minute load average; None where the system has none."""
    with suppress(OSError):
        return psutil.getloadavg()[0]
    return None


def physical_memory_bytes() -> int | None:
    """The memory of the whole machine, without regard to a container's limit; None where the system does not say."""
    with suppress(OSError):
        return psutil.virtual_memory().total
    return None


def available_memory_bytes() -> int | None:
    """Memory of the whole machine that is available without swapping; None where the system does not say."""
    with suppress(OSError):
        return psutil.virtual_memory().available
    return None


def machine_budget(root: Path = ROOT) -> int | None:
    """Bytes that models may take: nine tenths of what is available now; None where the system does not say.

    Where a cgroup of this process has less left than the machine, that counts.
    """
    left = [bytes_left for bytes_left in (available_memory_bytes(), *_cgroups_left(root)) if bytes_left is not None]
    return int(USABLE_SHARE * max(0, min(left))) if left else None


def mebibytes(count: float, digits: int = 0) -> str:
    """`count` bytes in MiB, as text."""
    return f"{count / 2**20:.{digits}f} MiB"


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection while many objects are made and few kept; then return freed memory to the system."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        give_back_freed()


def give_back_freed() -> None:
    """Return freed memory to the system, as far as the C library can."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl does not have it
        trim(0)


def own_pages(n_bytes: int) -> "np.ndarray":
    """Bytes to be filled, in pages that go back to the system as soon as they are freed.

    Long-lived arrays of many sizes would leave gaps in the heap: an eighth more than they hold.
    """
    import numpy as np

    if n_bytes < MAPPED_BYTES:
        return np.empty(n_bytes, np.uint8)
    private = [mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS] if hasattr(mmap, "MAP_ANONYMOUS") else []
    return np.frombuffer(mmap.mmap(-1, n_bytes, *private), np.uint8)


def _cpu_quota(cgroup: Path) -> int | None:
    """Whole CPUs the container may use (cgroup v2, then v1); None without a limit."""
    limit, _, period = _first_line(cgroup / "cpu.max").partition(" ")
    if not limit:
        limit = _first_line(cgroup / "cpu/cpu.cfs_quota_us")
        period = _first_line(cgroup / "cpu/cpu.cfs_period_us")
    if not re.fullmatch(r"\d+", limit) or not re.fullmatch(r"[1-9]\d*", period):
        return None
    return max(1, int(limit) // int(period))


def _cgroups_left(root: Path) -> Iterator[int]:
    """Memory left in each limited cgroup (v2 or v1) of this process, innermost first; page cache counts as left."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder == mount.parent:
                break
            limit, used = (_first_line(folder / file) for file in files)
            if limit.isdigit() and used.isdigit():
                yield int(limit) - int(used) + _inactive_file_bytes(folder)


def _inactive_file_bytes(folder: Path) -> int:
    counts = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    return int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "").strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _sysctl(name: str) -> str:
    """The answer of a Mac's `sysctl`; empty elsewhere, and where the kernel does not know `name`."""
    if sys.platform == "darwin":
        with suppress(OSError):
            answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
            return answer.stdout.strip() if answer.returncode == 0 else ""
    return ""
