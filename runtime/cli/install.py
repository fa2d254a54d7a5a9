"""Sets up the virtual environment: `make` runs it with any Python, so it needs nothing but the standard library.

It says what it does, one line for each phase with the time since the start. llama.cpp is compiled by itself, so that
its progress can be shown; what pip and the compiler print is kept in `install.log` beside the environment's Python.
"""

import argparse
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

ENGINE = "llama-cpp-python"
# Minutes that one core takes to compile llama.cpp, if it does nothing else: with AVX-512, and with AVX2.
_CORE_MINUTES = (6, 21)
_NINJA = re.compile(r"\s*\[(\d+)/(\d+)\] ")
_MAKE = re.compile(r"\s*\[ *(\d+)%\] ")
# pip collects a package from an index, takes its file from a folder, or passes over what is for other machines.
_COLLECTED = re.compile(r"(?:Collecting |Processing \S*/|Ignoring )([A-Za-z0-9._]+(?:-[A-Za-z][\w.]*)*)")
_COLLECTED_ALL = "Installing collected packages"
# Compiling has just begun: a rate would be a guess.
_FIRST_ESTIMATE_SHARE = 0.03
# Files differ, and a machine has other work: the estimate goes by the last minute.
_RATE_S = 60.0
_LAST_LINES = 25

ShareDone = Callable[[str], float | None]
"""Takes a line of output and returns the share that is done, if the line tells."""


def main() -> None:
    """Install what the lock file pins into the environment, and Deskside itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("venv", type=Path)
    parser.add_argument("--rebuild", action="store_true", help="compile llama.cpp anew, and nothing else")
    options = parser.parse_args()
    try:
        install(options.venv, Path("requirements.lock"), Told(sys.stderr), rebuild=options.rebuild)
    except PhaseFailed as failed:
        sys.exit(f"error: {failed}")
    except KeyboardInterrupt:
        sys.exit(130)


class PhaseFailed(Exception):
    """A command of the set-up ended with an error; the message has the end of its output."""


class Told:
    """The lines that the user reads: one for each phase, and within one its progress, on a terminal in place."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._started_s = self._phase_s = clock()
        self._in_place = out.isatty()
        self._tenths = 0
        self._seen: deque[tuple[float, float]] = deque([(self._phase_s, 0.0)])

    def phase(self, text: str) -> None:
        """Begin a phase."""
        self._phase_s, self._tenths = self._clock(), 0
        self._seen = deque([(self._phase_s, 0.0)])
        self._line(text)

    def progress(self, share: float) -> None:
        """Tell how far the phase is, and when it will be done: at once on a terminal, else at each tenth."""
        text = f"{share:4.0%} of it"
        if share >= _FIRST_ESTIMATE_SHARE:
            text += f", about {minutes(self._left_s(share))} left"
        if self._in_place:
            print(f"\r==> {self._time()}     {text}\x1b[K", end="", file=self._out, flush=True)
        elif int(share * 10) > self._tenths:
            self._tenths = int(share * 10)
            self._line(f"    {text}")

    def _left_s(self, share: float) -> float:
        now_s = self._clock()
        self._seen.append((now_s, share))
        while self._seen[1][0] <= now_s - _RATE_S:
            self._seen.popleft()
        since_s, before = self._seen[0]
        if share <= before:
            since_s, before = self._phase_s, 0.0
        return (1 - share) * (now_s - since_s) / (share - before)

    def _line(self, text: str) -> None:
        start = "\r\x1b[K" if self._in_place else ""
        print(f"{start}==> {self._time()} {text}", file=self._out, flush=True)

    def _time(self) -> str:
        passed_s = int(self._clock() - self._started_s)
        return f"{passed_s // 60}:{passed_s % 60:02}"


def install(venv: Path, lock: Path, told: Told, *, rebuild: bool = False) -> None:
    """Make `venv` if it is missing, and install; `rebuild`: only the engine, though it is there."""
    python, log = venv / "bin" / "python", venv / "install.log"
    venv.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    if not python.exists():
        told.phase(f"Making {venv}")
        run([sys.executable, "-m", "venv", str(venv)], log)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    engine, others = split_lock(lock.read_text())
    engine_file, others_file = venv / "engine.lock", venv / "others.lock"
    engine_file.write_text(engine)
    others_file.write_text(others)
    fetch = [*pip, "install", "--require-hashes", "-r"]
    if rebuild:
        subprocess.run([*pip, "cache", "remove", "-q", ENGINE.replace("-", "_")], capture_output=True, check=False)
    there = has_engine(python, pinned_version(engine)) or engine_is_cached(pip, pinned_version(engine))
    if rebuild or not there:
        told.phase(f"llama.cpp is to be compiled, once: {compile_estimate(cores())}")
    if not rebuild:
        n_packages = len(re.findall(r"^[\w.-]+==", others, re.MULTILINE))
        told.phase(f"Installing {n_packages} packages of requirements.lock, each checked by its hash")
        run([*fetch, str(others_file)], log, told, collected(n_packages), unpacks=True)
    told.phase("Compiling llama.cpp" if rebuild or not there else "Installing llama.cpp, compiled earlier")
    again = ["--force-reinstall"] if rebuild else []
    run([*fetch, str(engine_file), "--no-deps", "-v", *again], log, told, compiled)
    if not rebuild:
        told.phase("Installing Deskside")
        run([*pip, "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."], log)
    told.phase("The environment is ready")


def split_lock(text: str) -> tuple[str, str]:
    """The lines of a lock file for the engine, and all the others."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    ours = False
    for line in text.splitlines(keepends=True):
        if not line.startswith((" ", "\t", "#")):
            ours = line.startswith(f"{ENGINE}==")
        parts[ours].append(line)
    return "".join(parts[True]), "".join(parts[False])


def pinned_version(engine_lines: str) -> str:
    """The version of the engine that the lock file asks for."""
    found = re.match(rf"{ENGINE}==(\S+)", engine_lines)
    if found is None:
        raise PhaseFailed(f"requirements.lock pins no {ENGINE}")
    return found[1]


def engine_is_cached(pip: Sequence[str], version: str) -> bool:
    """True if pip has kept the engine from an earlier compile."""
    name = ENGINE.replace("-", "_")
    said = subprocess.run([*pip, "cache", "list", name], capture_output=True, text=True, check=False).stdout
    return f"{name}-{version}-" in said


def has_engine(python: Path, version: str) -> bool:
    """True if the environment has this version of the engine."""
    ask = f"import importlib.metadata as m; print(m.version({ENGINE!r}))"
    said = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False).stdout
    return said.strip() == version


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_estimate(n_cores: int) -> str:
    """The estimated time of the compile, in words."""
    least, most = (max(1, round(core_minutes / n_cores)) for core_minutes in _CORE_MINUTES)
    span = f"{least} to {most} minutes" if most > least else "about a minute"
    return f"{span} on {n_cores} idle core{'s' if n_cores > 1 else ''}"


def minutes(seconds: float) -> str:
    """A time in words."""
    return f"{max(1, round(seconds))} s" if seconds < 59.5 else f"{round(seconds / 60)} min"


def compiled(line: str) -> float | None:
    """A `ShareDone` of the compile, by the count that ninja or make prints."""
    if found := _NINJA.match(line):
        return int(found[1]) / max(1, int(found[2]))
    if found := _MAKE.match(line):
        return int(found[1]) / 100
    return None


def collected(n_packages: int) -> ShareDone:
    """A `ShareDone` of an installation, by the packages that pip has collected."""
    seen: set[str] = set()

    def share(line: str) -> float | None:
        if found := _COLLECTED.match(line):
            seen.add(found[1])
            return min(1.0, len(seen) / max(1, n_packages))
        return None

    return share


def run(
    command: Sequence[str],
    log: Path,
    told: Told | None = None,
    progress: ShareDone = lambda _: None,
    *,
    unpacks: bool = False,
) -> None:
    """Run a command, its output to the end of `log`. Raises PhaseFailed with the end of the output.

    `unpacks`: a phase of its own begins once pip has collected everything; pip does not tell how far that is.
    """
    last: list[str] = []
    with (
        log.open("a") as kept,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        done: float | None = None
        for line in _lines(process.stdout or ()):
            if line is not None:
                kept.write(line)
                if unpacks and told is not None and line.startswith(_COLLECTED_ALL):
                    told.phase("Unpacking them")
                    done, progress = None, _untold
                last = [*last, line][-_LAST_LINES:]
                share = progress(line)
                done = done if share is None else share
            if told is not None and done is not None:
                told.progress(done)
    if process.returncode:
        shown = "".join(f"    {line}" for line in last)
        raise PhaseFailed(
            f"{' '.join(command[:4])} … ended with {process.returncode}; all it said is in {log}:\n{shown}"
        )


def _untold(_: str) -> float | None:
    return None


def _lines(source: Iterable[str]) -> Iterator[str | None]:
    """The lines of a pipe, and None after each second without one, so that the clock keeps running."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in source:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


if __name__ == "__main__":
    main()
