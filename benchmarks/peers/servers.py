"""The servers of a comparison (Deskside, llama-server, llama-cpp-python's own), their files and their installation."""

import re
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path

from benchmarks.errors import ServerFailed
from benchmarks.load.servers import (
    BASE,
    RECIPE,
    ModelFile,
    RunningServer,
    converted,
    free_port,
    model_file,
    run_to_end,
    serve_command,
    serving,
)
from models.common.files import sha256_file
from models.gguf.header import read_meta
from models.store.store import Store

from .record import Server
from .tasks import DESKSIDE, LLAMA_CPP_SERVER, LLAMA_SERVER

UNIFIED, SPLIT, RAM, BEST, SHIPPED = "unified", "split", "ram", "best", "as shipped"
# The title of the file that Deskside chose for the fine-tune, of any quantization.
CHOSEN = "chosen"
# The other conversions. Q4_K_M with its whole vocabulary is the file that a user would serve elsewhere.
MADE = {"F16": (), "Q4_K_M": ("--whole-vocab",)}
# The profiles of llama-server, each a candidate for the best at every row; the one as shipped is no candidate.
CANDIDATES = (UNIFIED, SPLIT, RAM)
_SLOTS = "16 slots, {} cells, swa-full, continuous batching, prompts kept in the slots{}, warm"
LLAMA_SERVER_ARGUMENTS = {UNIFIED: "unified", SPLIT: "split", RAM: "split-ram", SHIPPED: "shipped"}
LLAMA_SERVER_SETTINGS = {
    UNIFIED: _SLOTS.format("one KV cache of 16 × {cells}", ""),
    SPLIT: _SLOTS.format("a KV stream each of {cells}", ""),
    RAM: _SLOTS.format("a KV stream each of {cells}", " and in memory (8 GiB)"),
    SHIPPED: "llama-server's own defaults: 4 slots, unified KV cache, sliding-window cache, prompts kept in memory",
}
# The longest few-shot prompt has about 1,900 tokens.
SLOT_CELLS = 2048
# Its defaults keep the logits of every prompt token (a MiB each with Gemma's whole vocabulary) and abort a stream when
# another request arrives: as shipped, most of 16 clients get no whole answer.
LLAMA_CPP_FLAGS = {
    BEST: [
        *("--n_ctx", "4096", "--logits_all", "false", "--flash_attn", "true", "--n_ubatch", "512"),
        *("--interrupt_requests", "false"),
    ],
    SHIPPED: [],
}
# The distribution that the peers use from our own environment, and its folders.
SHARED = "llama-cpp-python"
SHARED_FOLDERS = ("llama_cpp", "llama_cpp_python-")
READY = ".ready"
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True)
class PeerFiles:
    """The files that are served. `tuned` is the installed fine-tune, which all servers share."""

    tuned: ModelFile
    tuned_f16: ModelFile
    tuned_q4: ModelFile
    base: ModelFile
    ctranslate2: Path


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """A server to measure. `slow`: it gets a third of the requests; `once`: in the first repetition only.

    `ends`: the tokens that end an answer, for a server without `ignore_eos`, where a logit bias bans them.
    """

    facts: Server
    peer: str
    start: Callable[[Path], AbstractContextManager[RunningServer]]
    slow: bool = False
    once: bool = False
    ends: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.facts.name


def deskside_plan(file: ModelFile, threads: int, flags: Sequence[str] = ()) -> ServerPlan:
    """`deskside serve` in its default configuration, but for `flags`."""

    def start(log: Path) -> AbstractContextManager[RunningServer]:
        port = free_port()
        command = serve_command(str(file.folder), port, ["--threads", str(threads), *flags])
        return serving(command, port, log_file=log)

    return ServerPlan(_facts(DESKSIDE, "default", " ".join(flags) or "default settings", file), DESKSIDE, start)


def llama_server_plan(file: ModelFile, threads: int, profile: str, python: Path, cells: int = SLOT_CELLS) -> ServerPlan:
    """llama-server from the `xllamacpp` wheel, in one of LLAMA_SERVER_SETTINGS, with `cells` for each slot."""

    def start(log: Path) -> AbstractContextManager[RunningServer]:
        port = free_port()
        arguments = [str(file.path), str(port), str(threads), LLAMA_SERVER_ARGUMENTS[profile], str(cells)]
        return serving([str(python), "-P", script("serve_xllamacpp.py"), *arguments], port, log_file=log)

    facts = _facts(LLAMA_SERVER, profile, LLAMA_SERVER_SETTINGS[profile].format(cells=f"{cells:,}"), file)
    return ServerPlan(facts, LLAMA_SERVER, start, slow=profile == SHIPPED, once=profile == SHIPPED)


def llama_cpp_plan(file: ModelFile, threads: int, profile: str, python: Path) -> ServerPlan:
    """llama-cpp-python's own server on Deskside's compiled llama.cpp. It answers one request at a time."""

    def start(log: Path) -> AbstractContextManager[RunningServer]:
        port = free_port()
        shared = ["--host", "127.0.0.1", "--port", str(port), "--model", str(file.path)]
        shared += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
        command = [str(python), "-P", script("serve_llama_cpp.py"), *shared, *LLAMA_CPP_FLAGS[profile]]
        return serving(command, port, ready="/v1/models", log_file=log)

    settings = " ".join(LLAMA_CPP_FLAGS[profile]) or "default settings"
    facts = _facts(LLAMA_CPP_SERVER, profile, settings, file)
    return ServerPlan(facts, LLAMA_CPP_SERVER, start, slow=True, once=profile == SHIPPED, ends=end_tokens(file.path))


def end_tokens(gguf: Path) -> tuple[int, ...]:
    """The file's end-of-text and end-of-turn tokens; a trimmed vocabulary has its own ids."""
    meta = read_meta(gguf)
    return tuple(meta.number(key) for key in _ENDS if key in meta.values)


def prepare_files(store: Store, folder: Path, peers_python: Path) -> PeerFiles:
    """Find or convert the files. Raises ModelNotFound, BadManifest, or ServerFailed when a conversion fails."""
    tuned = replace(model_file(store.get(RECIPE)), title=CHOSEN)
    base = model_file(store.get(BASE), "base ")
    own = Store(folder / "home")
    made = {}
    for kind, options in MADE.items():
        # the hash in the name: another fine-tune or another trim gives another file
        name = f"{RECIPE}-{kind.lower()}-{tuned.sha256[:8]}"
        made[kind] = converted(own, name, "--quant", kind, *options)
    ctranslate2 = folder / f"ctranslate2-{tuned.sha256[:16]}"
    if not ctranslate2.exists():
        run_to_end(
            [str(peers_python), "-P", script("run_ctranslate2.py"), "convert", str(tuned.path), str(ctranslate2)], {}
        )
    return PeerFiles(tuned, made["F16"], made["Q4_K_M"], base, ctranslate2)


def install_peers(folder: Path) -> Path:
    """Make the venv in `folder` unless it is there; returns its Python. Raises ServerFailed when pip fails."""
    if python := installed_peers(folder):
        return python
    lock, python = _lock_file(), folder / "bin" / "python"
    print(f"installing the peers into {str(folder)!r} (downloads about 100 MB, once)", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    wheels = folder / "peers.txt"
    wheels.write_text(without(lock.read_text(encoding="utf-8"), SHARED), encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps"]
    done = subprocess.run([*command, "--require-hashes", "-r", str(wheels)], check=False)
    if done.returncode:
        raise ServerFailed(f"pip could not install the peers (exit {done.returncode}); its output is above")
    _link_shared(folder)
    (folder / READY).write_text(_wanted(), encoding="utf-8")
    return python


def installed_peers(folder: Path) -> Path | None:
    """The Python of the venv in `folder`; None unless it holds what the lock file asks for."""
    ready = folder / READY
    return folder / "bin" / "python" if ready.is_file() and ready.read_text(encoding="utf-8") == _wanted() else None


def _lock_file() -> Path:
    return Path(str(resources.files("benchmarks"))) / "peers.lock"


def _wanted() -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{sha256_file(_lock_file())} {version} {metadata.version(SHARED)}"


def peer_versions(python: Path) -> dict[str, str]:
    """Distribution -> version, from the peers' own Python."""
    names = ("xllamacpp", SHARED, "ctranslate2", "ik-llama-cpp-python")
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def without(lock: str, name: str) -> str:
    """Remove one distribution's entry and hashes from a pip lock file. Raises ValueError without exactly one entry."""
    entry = re.compile(rf"^{re.escape(name)}==[^\n]*(?:\n +--hash=[^\n]*)*\n", re.MULTILINE)
    rest, found = entry.subn("", lock)
    if found != 1:
        raise ValueError(f"expected one entry of {name!r} in the lock file, found {found}")
    return rest


def script(name: str) -> str:
    """The path of a script for the peers' Python."""
    return str(resources.files("benchmarks").joinpath("peers", "scripts", name))


def _facts(peer: str, profile: str, settings: str, file: ModelFile) -> Server:
    shown = "" if peer == DESKSIDE else f" {profile}"
    return Server(
        name=f"{peer}{shown}, {file.title or file.quantization}",
        profile=profile,
        settings=settings,
        quantization=file.quantization,
        size_bytes=file.path.stat().st_size,
        sha256=file.sha256,
    )


def _link_shared(folder: Path) -> None:
    site = next((folder / "lib").glob("python*/site-packages"))
    distribution = metadata.distribution(SHARED)
    names = {file.parts[0] for file in distribution.files or () if file.parts[0].startswith(SHARED_FOLDERS)}
    for name in names:
        (site / name).symlink_to(Path(str(distribution.locate_file(name))), target_is_directory=True)
