"""Everything the runtime can be told, as one frozen value; flags and DESKSIDE_* variables are made from its fields.

A new setting is one new field here, and nothing else: `config_flags` turns the fields into command-line options.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

ENV_PREFIX = "DESKSIDE_"
LOG_LEVELS = ("debug", "info", "warning", "error")

Group = Literal["engine", "server"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field's text form is: its help, how it is parsed, its bounds (inclusive), and who takes it."""

    help: str
    parse: Callable[[str], Any]
    metavar: str
    group: Group
    minimum: float | None = None
    maximum: float | None = None


def _auto_or_int(text: str) -> int | None:
    return None if text.strip().lower() == "auto" else int(text)


def _auto_or_float(text: str) -> float | None:
    return None if text.strip().lower() == "auto" else float(text)


def _auto_off_or_int(text: str) -> int | None:
    return 0 if text.strip().lower() == "off" else _auto_or_int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _engine(default: Any, help_text: str, minimum: int, maximum: int) -> Any:
    setting = Setting(help_text, int, "INTEGER", "engine", minimum, maximum)
    return field(default=default, metadata={"setting": setting})


def _server(default: Any, setting: Setting) -> Any:
    return field(default=default, metadata={"setting": setting})


@dataclass(frozen=True)
class RuntimeConfig:
    """How to load, run and serve models.

    `threads`, `gpu_layers`, `memory_budget` and `speculate` None: found out from the machine, or while running.

    Raises ValueError, naming the flag, its limits and the value, when a field is out of range.
    """

    slots: int = _engine(16, "Answers written at the same time.", 1, 128)
    context: int = _engine(8192, "Tokens in the KV cache, shared by all slots.", 64, 1 << 22)
    step_tokens: int = _engine(512, "Most tokens computed in one step.", 16, 1 << 15)
    threads: int | None = field(
        default=None,
        metadata={"setting": Setting("CPU threads; auto: physical cores.", _auto_or_int, "auto|N", "engine", 1, 1024)},
    )
    gpu_layers: int | None = field(
        default=None,
        metadata={
            "setting": Setting(
                "Layers on the GPU; auto: all, if llama.cpp can.", _auto_or_int, "auto|N", "engine", 0, 10000
            )
        },
    )
    speculate: int | None = field(
        default=None,
        metadata={
            "setting": Setting(
                "Most tokens verified ahead where an answer copies; auto: as many as pay.",
                _auto_off_or_int,
                "auto|off|N",
                "engine",
                0,
                64,
            )
        },
    )
    host: str = _server("127.0.0.1", Setting("Address to listen on.", str, "TEXT", "server"))
    port: int = _server(8080, Setting("Port to listen on; 0: any free one.", int, "INTEGER", "server", 0, 65535))
    queue: int = _server(256, Setting("Answers that may wait for a slot.", int, "INTEGER", "server", 0, 1 << 20))
    max_body_bytes: int = _server(
        4 << 20, Setting("Largest request body, in bytes.", int, "BYTES", "server", 1024, 1 << 30)
    )
    drain_seconds: float = _server(
        30.0, Setting("Time for running answers to finish at SIGTERM.", float, "SECONDS", "server", 0, 86400)
    )
    idle_minutes: float = _server(
        0.0, Setting("Unload a model unused for so long; 0: never.", float, "MINUTES", "server", 0, 1 << 20)
    )
    memory_budget: float | None = _server(
        None,
        Setting(
            "Memory for models, in GiB; auto: 9/10 of what is free.", _auto_or_float, "auto|GIB", "server", 0, 1 << 20
        ),
    )
    api_key: str = _server("", Setting("Key clients must send as bearer token; empty: none.", str, "KEY", "server"))
    cors_origins: tuple[str, ...] = _server(
        (), Setting("Web origins whose pages may call, comma-separated; empty: none.", _words, "ORIGINS", "server")
    )
    log_level: str = _server("info", Setting("One of debug, info, warning, error.", str.lower, "LEVEL", "server"))

    def __post_init__(self) -> None:
        for name, setting in settings().items():
            value = getattr(self, name)
            low, high = setting.minimum, setting.maximum
            if value is not None and low is not None and high is not None and not low <= value <= high:
                raise ValueError(f"{flag(name)} must lie between {low:g} and {high:g}, got {value!r}")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}")

    @classmethod
    def from_text(cls, texts: Mapping[str, str]) -> Self:
        """From field name -> text, as flags and the environment give it. Raises ValueError naming the flag."""
        values: dict[str, Any] = {}
        for name, text in texts.items():
            setting = settings()[name]
            try:
                values[name] = setting.parse(text)
            except ValueError:
                raise ValueError(f"{flag(name)} takes {setting.metavar}, got {text!r}") from None
        return cls(**values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """From the DESKSIDE_* variables of `environ` (None: this process's), defaults for the rest."""
        source = os.environ if environ is None else environ
        return cls.from_text({name: source[env_name(name)] for name in settings() if source.get(env_name(name))})


def settings(group: Group | None = None) -> dict[str, Setting]:
    """Field name -> its setting, in order; of one group when given."""
    found = {f.name: f.metadata["setting"] for f in fields(RuntimeConfig)}
    return {name: setting for name, setting in found.items() if group in (None, setting.group)}


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """The environment variable of a field."""
    return ENV_PREFIX + name.upper()


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may use: hyper-threads counted once, affinity and container quota respected.

    llama.cpp gains nothing from a second thread on the same core. `root` stands in for `/` in tests.
    """
    if sys.platform == "darwin":
        return _sysctl_cores() or os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    cores = {_first_line(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quota = _cpu_quota(root / "sys/fs/cgroup")
    return max(1, min(len(cores), quota) if quota else len(cores))


def _cpu_quota(cgroup: Path) -> int | None:
    """Whole CPUs the container may use (cgroup v2, then v1); None without a limit."""
    limit, _, period = (_first_line(cgroup / "cpu.max") or "").partition(" ")
    if not limit:
        limit = _first_line(cgroup / "cpu/cpu.cfs_quota_us") or ""
        period = _first_line(cgroup / "cpu/cpu.cfs_period_us") or ""
    if not re.fullmatch(r"\d+", limit) or not re.fullmatch(r"[1-9]\d*", period):
        return None
    return max(1, int(limit) // int(period))


def _sysctl_cores() -> int | None:
    """Performance cores of a Mac, or all physical ones where the chip has one kind."""
    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip().isdigit():
            return int(answer.stdout)
    return None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip().splitlines()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return None
