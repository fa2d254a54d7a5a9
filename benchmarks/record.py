"""The records of a benchmark run, and the JSON file that holds them.

A run is saved before anything is computed from it: raw arrival times first, statistics after, so that every figure can
be computed again from the file. Times in a `RequestSample` are seconds since its level began, on one monotonic clock;
statistics are in milliseconds.
"""

import json
import platform
from codecs import BOM_UTF8
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from models.common.file_kinds import file_kind
from models.common.files import write_atomic
from models.common.machine import describe_cpu, logical_cores, physical_memory_bytes, processor_kind
from models.common.record import Record

from .errors import BadRecord

PACKAGES = ("deskside", "llama-cpp-python", "httpx", "genai-prices")

AnyRecord = TypeVar("AnyRecord", bound=Record)


class RequestSample(Record):
    """One request as the client saw it.

    `scheduled_s` is the planned time of sending, `sent_s` the actual one; `deltas_s` are the arrivals of the chunks
    that carried text, `finished_s` that of the finish reason (or of the last byte). `error` is None for a whole answer;
    a failed sample keeps the parts that had arrived. `retry_after_s`: a server that is full or limits its rate may be
    asked again after this time. `probabilities` are those of a decision's choices.
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
    retry_after_s: float | None = None
    probabilities: dict[str, float] = Field(default_factory=dict)


class Level(Record):
    """All requests of one arm at one concurrency, closed loop. `load_before` is the 1-minute load average."""

    concurrency: int
    load_before: float | None = None
    samples: tuple[RequestSample, ...]


class Arm(Record):
    """One way of answering the workload.

    `streams` is False when arrival times within an answer mean nothing. `shared_share` is the share of a prompt's
    characters that is the same in every request.
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
    max_tokens: int | None = None
    start_s: float | None = None
    warmup: tuple[RequestSample, ...] = ()
    levels: tuple[Level, ...] = ()


class Workload(Record):
    """The examples of a run and how they were drawn."""

    examples: str
    sha256: str
    available: int
    requests_per_level: int
    concurrency: tuple[int, ...]
    seed: int
    labels: tuple[str, ...]


class MachineRecord(Record):
    """The machine that a run was measured on. `processor` is AMX, AVX-512 or AVX2; empty where it has none of them."""

    system: str
    cpu: str
    processor: str = ""
    logical_cores: int
    memory_bytes: int | None
    python: str
    packages: dict[str, str]


class BenchRun(Record):
    """One run of `deskside bench`. `statistics` and `cost` are derived; an interrupted run has neither."""

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
    """Read a run's file. Raises BadRecord naming the file and the first wrong field."""
    return load_record(path, BenchRun, "is not a benchmark run")


def load_record(path: Path, kind: type[AnyRecord], fault: str) -> AnyRecord:
    """Read a file that holds a `kind`. Raises BadRecord with the file, `fault` and the first wrong field."""
    given = file_kind(path)
    if given.kind not in {"json", "json lines", "missing", "empty"}:
        raise BadRecord(f"{str(path)!r} {fault}: it is {given.name}")
    try:
        return kind.model_validate_json(path.read_bytes().removeprefix(BOM_UTF8))
    except OSError as error:
        raise BadRecord(f"{str(path)!r} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise BadRecord(f"{str(path)!r} {fault}: {field}: {first['msg']}") from error


def results_file(name: str) -> Path:
    """The default file of a run: `results/NAME-<now>.json`."""
    return Path("results") / f"{name}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}.json"


def now_text() -> str:
    """The present time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def this_machine() -> MachineRecord:
    """Describe this machine: system, processor, cores, memory, Python, versions of the installed PACKAGES."""
    return MachineRecord(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=describe_cpu(),
        processor=processor_kind(),
        logical_cores=logical_cores(),
        memory_bytes=physical_memory_bytes(),
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
