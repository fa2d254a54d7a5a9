"""Report on this machine, the installation and the default model; each failed check comes with its fix.

Bug reports begin with it, so it never fails: a fact that the system does not give is reported as unknown.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.common.console import page
from models.common.machine import (
    available_memory_bytes,
    describe_cpu,
    logical_cores,
    physical_cores,
    physical_memory_bytes,
)
from models.errors import ModelError
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store, StoredModel

DISK_NEEDED_BYTES = 2 << 30
GPU_HELP = "README, 'GPU': how to install llama-cpp-python for CUDA, Metal or Vulkan"


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes in bytes; None where the system does not say."""

    system: str
    cpu: str
    physical_cores: int
    logical_cores: int
    memory_bytes: int | None
    memory_available_bytes: int | None


@dataclass(frozen=True, slots=True)
class Check:
    """A condition that must hold. `fix` is the command or step that restores it."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Facts and checks; `healthy` when every check holds."""

    machine: Machine
    python: str
    deskside: str
    llama_cpp_python: str
    backend: str
    gpu_offload: bool
    prompts: str
    store: str
    disk_free_bytes: int
    models: tuple[dict[str, Any], ...]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """True when the default model can be served now."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it."""
        return {**asdict(self), "healthy": self.healthy}


def examine(store: Store) -> Report:
    """Collect facts and run all checks. Slow parts: loading llama.cpp (under a second), reading manifests."""
    backend, gpu_offload, trouble = llama_cpp_state()
    disk_free = shutil.disk_usage(_existing(store.home)).free
    models, damaged = _installed(store)
    return Report(
        machine=_machine(),
        python=f"{platform.python_version()} ({sys.executable})",
        deskside=_version("deskside"),
        llama_cpp_python=_version("llama-cpp-python"),
        backend=backend,
        gpu_offload=gpu_offload,
        prompts="unknown" if trouble else _prompts(),
        store=str(store.home),
        disk_free_bytes=disk_free,
        models=tuple(_model_row(model) for model in models),
        checks=(
            _check_python(),
            Check("llama.cpp", not trouble, trouble or backend + _slow_amx(backend), "make rebuild"),
            _check_store(store.home, disk_free, bool(models)),
            *damaged,
            *_check_default(models),
        ),
    )


def human_bytes(count: int | None) -> str:
    """Format `count` bytes in the largest unit that keeps it above 1."""
    if count is None:
        return "unknown"
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{size:.1f} {unit}"


def _machine() -> Machine:
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        cpu=describe_cpu(),
        physical_cores=physical_cores(),
        logical_cores=logical_cores(),
        memory_bytes=physical_memory_bytes(),
        memory_available_bytes=available_memory_bytes(),
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def llama_cpp_state() -> tuple[str, bool, str]:
    """(backend, True if it can offload to a GPU, the reason why llama.cpp cannot be loaded or an empty text)."""
    try:
        from runtime.llama.handle import describe_build

        return *describe_build(), ""
    except (ImportError, OSError, RuntimeError) as error:
        return "unknown", False, f"llama-cpp-python cannot be loaded: {error}"


def _prompts() -> str:
    from runtime.llama.handle import describe_prompts

    return describe_prompts()


def _slow_amx(backend: str) -> str:
    return ": built without the AMX patch; run `make rebuild`" if "AMX unused" in backend else ""


def _installed(store: Store) -> tuple[list[StoredModel], list[Check]]:
    models, damaged = [], []
    for name in store.names():
        try:
            models.append(store.get(name))
        except (ModelError, OSError) as error:
            fix = f"deskside models remove {name} && deskside pull {name}"
            damaged.append(Check(f"model {name}", False, str(error), fix))
    return models, damaged


def _model_row(model: StoredModel) -> dict[str, Any]:
    from runtime.prefill.prompts import extra_bytes

    artefacts = model.manifest.artefacts if model.manifest else ()
    quantization = artefacts[0].quantization if artefacts else ""
    return {
        "name": model.name,
        "quantization": quantization,
        "size_bytes": model.gguf.stat().st_size,
        "panel_bytes": extra_bytes(model.gguf),
    }


def _check_python() -> Check:
    return Check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or newer")


def _check_store(home: Path, disk_free: int, has_models: bool) -> Check:
    if not os.access(_existing(home), os.W_OK):
        fix = "set DESKSIDE_HOME to a writable folder"
        return Check("store", False, f"{str(home)!r} cannot be written", fix)
    enough = has_models or disk_free >= DISK_NEEDED_BYTES
    detail = f"{str(home)!r}, {human_bytes(disk_free)} free"
    if not enough:
        detail += f"; building the default model needs {human_bytes(DISK_NEEDED_BYTES)}"
    return Check("store", enough, detail, "free some disk, or set DESKSIDE_HOME to a folder on a larger one")


def _check_default(models: list[StoredModel]) -> Iterator[Check]:
    found = next((model for model in models if model.name == DEFAULT_MODEL), None)
    detail = f"installed, {human_bytes(found.gguf.stat().st_size)}" if found else "not installed"
    yield Check(f"model {DEFAULT_MODEL}", found is not None, detail, f"deskside pull {DEFAULT_MODEL}")


def print_report(report: Report, console: Console | None = None) -> None:
    """Print facts, models and checks to stdout; each failed check is followed by its fix."""
    console = console or page()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(report).items():
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    for check in report.checks:
        mark = ("ok     ", "green") if check.ok else ("missing", "red")
        console.print(Text.assemble(mark, f"  {check.name}: {check.detail}"))
        if not check.ok:
            console.print(Text(f"         fix: {check.fix}"))


def _facts(report: Report) -> dict[str, str]:
    machine = report.machine
    memory = f"{human_bytes(machine.memory_bytes)}, {human_bytes(machine.memory_available_bytes)} available"
    offload = "yes" if report.gpu_offload else f"no ({GPU_HELP})"
    models = [
        f"{model['name']} {model['quantization']} {human_bytes(model['size_bytes'])}"
        + (f" (+ {human_bytes(model['panel_bytes'])} if Deskside computes prompts)" if model["panel_bytes"] else "")
        for model in report.models
    ]
    return {
        "system": machine.system,
        "cpu": f"{machine.cpu}, {machine.physical_cores} physical cores, {machine.logical_cores} logical",
        "memory": memory,
        "python": report.python,
        "deskside": report.deskside,
        "llama-cpp-python": f"{report.llama_cpp_python}, {report.backend}",
        "gpu offload": offload,
        "prompts": report.prompts,
        "store": f"{report.store}, {human_bytes(report.disk_free_bytes)} free",
        "models": "; ".join(models) or "none",
    }
