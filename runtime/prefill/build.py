"""The backend's library: compiled once per machine, compiler and llama.cpp, and kept in Deskside's home.

llama-cpp-python installs libraries without headers, so `ggml_abi.h` declares what a backend needs of ggml. Those
declarations hold for the releases in `PROVED`; with any other, prompts are computed by llama.cpp itself.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROVED = ("0.3.36",)
"""Releases of llama-cpp-python whose binary interface was compared with `ggml_abi.h`."""
NEEDED = ("avx2", "fma", "f16c")
SOURCES = ("prefill.cpp", "kernel.h", "attention.h", "ggml_abi.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 120

_FOLDER = Path(__file__).parent


class Unavailable(Exception):
    """The backend cannot be used here; the text says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """The machine and the release that a library is compiled for."""

    system: str
    cpu: str
    features: frozenset[str]
    llama_version: str

    @classmethod
    def here(cls, llama_version: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> "Host":
        """The machine that this process runs on."""
        try:
            lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        pairs = (line.partition(":") for line in reversed(lines))
        names = {name.strip(): value.strip() for name, _, value in pairs}
        system = f"{sys.platform} {platform.machine()}"
        return cls(system, names.get("model name", ""), frozenset(names.get("flags", "").split()), llama_version)


def require_host(host: Host) -> None:
    """Raise Unavailable unless the library can run on `host`."""
    if host.system != "linux x86_64":
        raise Unavailable(f"Deskside's products are for Linux on x86-64, this is {host.system}")
    if missing := [name.upper() for name in NEEDED if name not in host.features]:
        raise Unavailable(f"this processor lacks {', '.join(missing)}")
    if host.llama_version not in PROVED:
        raise Unavailable(f"they are proved with llama-cpp-python {', '.join(PROVED)}, not with {host.llama_version}")


def library(folder: Path, host: Host, compiler: str | None = None) -> Path:
    """The library in `folder` for `host`, compiled if it is not there yet (3 s). Raises Unavailable."""
    require_host(host)
    compiler = compiler or find_compiler()
    target = folder / f"{key(host, _version(compiler))}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def find_compiler(which: Callable[[str], str | None] = shutil.which) -> str:
    """The C++ compiler, as set-up finds it: $CXX, c++ or g++. Raises Unavailable."""
    for name in (os.environ.get("CXX", ""), "c++", "g++"):
        if name and (found := which(name)):
            return found
    raise Unavailable("no C++ compiler was found; Debian/Ubuntu: apt-get install g++")


def key(host: Host, compiler_version: str) -> str:
    """A hash of everything that the library's code depends on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    for text in (*FLAGS, host.system, host.cpu, *sorted(host.features), host.llama_version, compiler_version):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:24]


def _version(compiler: str) -> str:
    try:
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiler {compiler!r} does not run: {error}") from error
    return answer.stdout


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
            made = Path(folder) / target.name
            command = [compiler, *FLAGS, str(_FOLDER / SOURCES[0]), "-o", str(made)]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            if answer.returncode != 0 or not made.exists():
                lines = [line for line in answer.stderr.splitlines() if "error" in line] or answer.stderr.splitlines()
                raise Unavailable(f"{compiler} failed: {lines[0].strip() if lines else 'it gives no reason'}")
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler} failed: {error}") from error
