"""The description of the machine; files stand in for those of Linux."""

import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from models.common import machine
from models.common.machine import (
    USABLE_SHARE,
    available_memory_bytes,
    describe_cpu,
    describe_machine,
    load_average,
    machine_budget,
    mebibytes,
    own_pages,
    physical_cores,
    physical_memory_bytes,
    processor_kind,
    vector_kind,
)

GIB = 1 << 30
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_processor_cores_and_backend_are_named(tmp_path: Path) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nmodel name\t: other\n"
    line = describe_machine("CPU (AVX2)", write(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert line.startswith("AMD EPYC 7B13, ")
    assert "logical cores" in line
    assert line.endswith(", CPU (AVX2)")


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("fpu sse2 avx avx2 fma", "AVX2"),
        ("avx2 avx512f avx512_vnni", "AVX-512"),
        ("avx2 avx512f amx_bf16 amx_tile amx_int8", "AMX"),
        ("fpu sse2", ""),
    ],
)
def test_the_widest_vectors_of_a_processor(tmp_path: Path, flags: str, kind: str) -> None:
    assert processor_kind(write(tmp_path, {"proc/cpuinfo": f"model name\t: avx2\nflags\t\t: {flags}\n"})) == kind
    assert processor_kind(tmp_path / "elsewhere") == ""


def test_the_vectors_that_llama_cpp_was_built_for() -> None:
    assert vector_kind("CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1") == "AVX2"
    assert vector_kind("CPU (AVX2, AVX512, AMX_INT8, FMA)") == "AMX"
    assert vector_kind("CPU (AVX2, AVX512, AMX unused, FMA)") == "AVX-512"
    assert vector_kind("CPU : NEON = 1") == ""


def test_an_unknown_processor_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(sys, "platform", "linux")
    assert describe_cpu(tmp_path) == "unknown processor"
    assert describe_machine(root=tmp_path).startswith("unknown processor, ")


def siblings(*lists: str) -> dict[str, str]:
    name = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {name.format(cpu): text + "\n" for cpu, text in enumerate(lists)}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        (siblings("0-1", "0-1", "2-3", "2-3"), 2),
        (siblings("0,2", "1,3", "0,2", "1,3") | {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_physical_cores_counts_hyperthreads_once_and_keeps_to_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert physical_cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(("performance", "cores"), [("6", 6), ("", 10)])
def test_a_mac_counts_its_performance_cores(monkeypatch: pytest.MonkeyPatch, performance: str, cores: int) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_sysctl", {"hw.perflevel0.physicalcpu": performance}.__getitem__)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 10)
    assert physical_cores() == cores


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "max\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/\n",
                V2 + "memory.max": f"{4 * GIB}\n",
                V2 + "memory.current": f"{3 * GIB}\n",
                V2 + "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "0::/team/job\n",
                V2 + "team/job/memory.max": "max\n",
                V2 + "team/job/memory.current": "0\n",
                V2 + "team/memory.max": f"{2 * GIB}\n",
                V2 + "team/memory.current": "0\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n0::/\n",
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "memory.usage_in_bytes": "0\n",
                V1 + "box/memory.limit_in_bytes": f"{GIB}\n",
                V1 + "box/memory.usage_in_bytes": f"{GIB // 2}\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "0\n", V2 + "memory.current": "7\n"}, 0),
    ],
    ids=["machine", "no limit", "v2 and its cache", "v2 parent", "v1", "over the limit"],
)
def test_the_budget_is_nine_tenths_of_the_least_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], gib: float
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert machine_budget(write(tmp_path, files)) == int(USABLE_SHARE * gib * GIB)


def test_a_system_that_does_not_say_has_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", unreadable)
    assert machine_budget(write(tmp_path, {"proc/self/cgroup": "0::/\n"})) is None
    assert physical_memory_bytes() is None


def test_this_machine_has_memory_and_a_load() -> None:
    total, available, budget = physical_memory_bytes(), available_memory_bytes(), machine_budget()
    assert total is None or available is None or 0 < available <= total
    assert budget is None or budget > 0
    load = load_average()
    assert load is None or load >= 0


def test_sizes_are_in_mebibytes() -> None:
    assert (mebibytes(5 << 20), mebibytes(3 << 19, 1)) == ("5 MiB", "1.5 MiB")


CHURN = """
import random
import sys

import numpy as np
import psutil

from models.common.machine import own_pages

made = {"own pages": own_pages, "heap": lambda n_bytes: np.empty(n_bytes, np.uint8)}[sys.argv[1]]
chance, held, total, limit = random.Random(1), [], 0, 64 << 20
before = psutil.Process().memory_info().rss
for _ in range(1500):
    data = made(chance.randint(5, 50) * 9001)
    data[:] = 1
    held.append(data)
    total += len(data)
    while total > limit:
        total -= len(held.pop(chance.randrange(len(held) // 4 + 1)))
print((psutil.Process().memory_info().rss - before) / total)
"""


def test_arrays_of_many_sizes_leave_no_gaps_in_own_pages() -> None:
    taken = {}
    for way in ("own pages", "heap"):
        done = subprocess.run([sys.executable, "-c", CHURN, way], capture_output=True, text=True, check=True)
        taken[way] = float(done.stdout)
    assert taken["own pages"] < 1.04
    assert taken["heap"] > taken["own pages"]


@pytest.mark.parametrize("n_bytes", [1, machine.MAPPED_BYTES - 1, machine.MAPPED_BYTES, 3 * machine.MAPPED_BYTES + 5])
def test_own_pages_can_be_filled(n_bytes: int) -> None:
    data = own_pages(n_bytes)
    data[:] = random.Random(n_bytes).randint(1, 255)
    assert len(data) == n_bytes
    assert data.all()
