"""The records of a benchmark run, and the JSON file that holds them.

A run is saved before anything is computed from it: raw arrival times first, statistics after, so that every figure can
be computed again from the file. Times in a `RequestSample` are seconds since its level began, on one monotonic clock;
statistics are in milliseconds.
"""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from models.common.files import write_atomic
from models.common.record import Record as Record

from .errors import BadRecord

AnyRecord = TypeVar("AnyRecord", bound=Record)


class RequestSample(Record):
    """One request, as the client saw it.

    `scheduled_s` is when it should have gone out, `sent_s` when it did; `deltas_s` are the arrivals of every chunk
    that carried text, `finished_s` the arrival of the finish reason (or of the last byte). `error` is None when the
    answer came whole; a failed sample keeps whatever had arrived.
    """

    id: str
    label: str
    scheduled_s: float
    sent_s: float
    deltas_s: tuple[float, ...] = ()
    finished_s: float
    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


class Level(Record):
    """All requests of one arm at one concurrency, closed loop. `load_before` is the 1-minute load average."""

    concurrency: int
    load_before: float | None = None
    samples: tuple[RequestSample, ...]


class Arm(Record):
    """One way of answering the workload.

    `streams` is False when arrival times within an answer mean nothing. `shared_share` is the part of a prompt, in
    characters, that is the same in every request.
    """

    name: str
    kind: Literal["measured", "replayed"]
    model: str
    prompt: str
    endpoint: str
    quantization: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    source: str = ""
    shared_share: float = 0.0
    streams: bool = True
    measures_accuracy: bool = True
    start_s: float | None = None
    warmup: tuple[RequestSample, ...] = ()
    levels: tuple[Level, ...] = ()


class Workload(Record):
    """What was asked: which examples, drawn how."""

    examples: str
    sha256: str
    available: int
    requests_per_level: int
    concurrency: tuple[int, ...]
    seed: int
    labels: tuple[str, ...]


class MachineRecord(Record):
    """Where it ran."""

    system: str
    cpu: str
    logical_cores: int
    memory_bytes: int | None
    python: str
    packages: dict[str, str]


class BenchRun(Record):
    """One benchmark run. `statistics` and `cost` are derived and absent from a run that was interrupted."""

    schema_version: Literal[1] = 1
    started_at: str
    finished_at: str | None = None
    machine: MachineRecord
    workload: Workload
    arms: tuple[Arm, ...] = ()
    statistics: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def save_json(path: Path, value: Any) -> None:
    """Write `value` as JSON: whole or not at all, and on the disk when this returns. NaN is refused (ValueError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def save_run(path: Path, run: BenchRun) -> None:
    """Write the run's file, whole or not at all."""
    save_json(path, run.model_dump(mode="json"))


def load_run(path: Path) -> BenchRun:
    """Read a run's file. Raises BadRecord naming the file and the first field that is wrong."""
    return load_record(path, BenchRun, "is not a benchmark run")


def load_record(path: Path, kind: type[AnyRecord], otherwise: str) -> AnyRecord:
    """Read a file that holds a `kind`. Raises BadRecord: the file, `otherwise`, and the first field that is wrong."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadRecord(f"{str(path)!r} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise BadRecord(f"{str(path)!r} {otherwise}: {field}: {first['msg']}") from error


PACKAGES = ("deskside", "llama-cpp-python", "httpx", "genai-prices")


def describe() -> MachineRecord:
    """This machine: system, processor, cores, memory, Python and the packages that matter."""
    return MachineRecord(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu(),
        logical_cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
    )


def load_average() -> float | None:
    """The 1-minute load average, or None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return platform.processor() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
