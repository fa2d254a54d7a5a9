"""A server started for the time of a benchmark with the command a user would type, and stopped by its process id.

It serves model files of the default model's recipe, converted when missing.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import FrameType, TracebackType

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.errors import ServerFailed
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store, StoredModel

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05
RECIPE, BASE = DEFAULT_MODEL, "gemma-3-270m"


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers: its OpenAI base URL (`…/v1`), seconds from start to ready, the pid if started here."""

    base_url: str
    start_s: float
    pid: int | None = None


def deskside_command(*arguments: str) -> list[str]:
    """The command line of the `deskside` beside this interpreter, or else of the one on PATH. Raises ServerFailed."""
    beside = Path(sys.executable).with_name("deskside")
    found = str(beside) if beside.exists() else shutil.which("deskside")
    if found is None:
        raise ServerFailed("the command 'deskside' is not installed: run `make setup`, or give --url")
    return [found, *arguments]


def serve_command(model: str, port: int, flags: Sequence[str] = ()) -> list[str]:
    """The command line that serves `model` on `port` of this machine."""
    return deskside_command("serve", model, "--host", "127.0.0.1", "--port", str(port), *flags)


def free_port() -> int:
    """A port of this machine that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get_local(url: str) -> httpx.Response:
    """GET from a server of this machine: plain HTTP, so that the CA certificates need not be loaded."""
    return httpx.get(url, trust_env=False, timeout=30.0, verify=False)  # noqa: S501


@contextmanager
def serving(
    command: Sequence[str],
    port: int,
    *,
    timeout_s: float = START_TIMEOUT_S,
    ready: str = "/health",
    log_file: Path | None = None,
) -> Iterator[RunningServer]:
    """Run `command` until the block ends; yields once the path `ready` on `port` answers 200.

    `log_file` gets the server's own output. Raises ServerFailed with the end of that output when the server exits or
    is not ready within `timeout_s`.
    """
    with _exit_on_sigterm(), log_file.open("w+b") if log_file else tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            try:
                _wait_ready(process, f"http://127.0.0.1:{port}{ready}", began + timeout_s)
            except ServerFailed as error:
                raise ServerFailed(f"{error}\n{_tail(log.fileno())}") from None
            yield RunningServer(f"http://127.0.0.1:{port}/v1", time.perf_counter() - began, process.pid)
        finally:
            _stop(process)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block, so that the server is stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_ready(process: subprocess.Popen[bytes], url: str, deadline: float) -> None:
    with httpx.Client(trust_env=False, timeout=5.0) as http:
        while time.perf_counter() < deadline:
            if (code := process.poll()) is not None:
                raise ServerFailed(f"the server stopped with exit code {code} before it was ready")
            try:
                if http.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(POLL_S)
    raise ServerFailed(f"the server was not ready in time: {url} did not answer 200")


def read_counters(text: str, names: Sequence[str]) -> dict[str, float]:
    """Read metrics from Prometheus' text format, each summed over its models; absent ones are left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in names:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(descriptor: int, limit: int = 2000) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, limit, max(0, size - limit)).decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file to serve, its model's folder (with the manifest), and its facts.

    `title` names it among the files of a comparison; empty: its quantization does.
    """

    path: Path
    folder: Path
    quantization: str
    sha256: str
    title: str = ""


def recipe_file(*parts: str) -> Path:
    """A file of the default model's folder in the `models` package."""
    return Path(str(resources.files("models"))).joinpath("email_triage", *parts)


def converted(store: Store, name: str, *options: str) -> ModelFile:
    """The store's model `name`, converted from the recipe with `options` when missing. Raises ServerFailed."""
    if name not in store.names():
        command = deskside_command("convert", RECIPE, *options, "--name", name)
        run_to_end(command, {"DESKSIDE_HOME": str(store.home)})
    return model_file(store.get(name))


def model_file(stored: StoredModel, prefix: str = "") -> ModelFile:
    """The file that `deskside serve` loads for an installed model, titled `prefix` + quantization.

    Raises ServerFailed when the manifest does not list the file.
    """
    for artefact in stored.manifest.artefacts if stored.manifest else ():
        if stored.folder / artefact.file == stored.gguf:
            kind = artefact.quantization
            return ModelFile(stored.gguf, stored.folder, kind, artefact.sha256, prefix + kind)
    raise ServerFailed(f"the manifest of {stored.name!r} does not list {stored.gguf.name!r}: install the model again")


def run_to_end(command: list[str], environment: dict[str, str]) -> None:
    """Run `command` with these variables added. Raises ServerFailed with the end of its stderr when it fails."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"{' '.join(command[:4])} … failed (exit {done.returncode}):\n{done.stderr[-2000:]}")


PROC = Path("/proc")
SAMPLE_S = 0.02  # the kernel walks the page tables for each sample


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def children(pid: int) -> list[int]:
    """The processes that any thread of `pid` started; none when it has ended or the system has no /proc.

    The kernel lists them per thread. psutil reads every process of the system instead, which at 50 samples a second
    would disturb the measured times.
    """
    found = []
    for listing in (PROC / str(pid)).glob("task/*/children"):
        try:
            found += [int(word) for word in listing.read_text(encoding="ascii").split()]
        except OSError:
            continue
    return sorted(found)


def proportional_bytes(pid: int) -> int:
    """The proportional set size (PSS) of a process: a page that n processes share counts as an n-th.

    0 when it has ended or the system does not report it (Linux does).
    """
    try:
        return int(getattr(psutil.Process(pid).memory_full_info(), "pss", 0))
    except psutil.Error:
        return 0


def tree_bytes(pid: int) -> int:
    """The memory of a process and its descendants, shared pages counted once."""
    return proportional_bytes(pid) + sum(tree_bytes(child) for child in children(pid))


class PeakWatch:
    """Sample a process and its descendants every SAMPLE_S seconds while its block runs.

    `peak_bytes` is their largest total at one time; 0 where the system reports no PSS.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))
