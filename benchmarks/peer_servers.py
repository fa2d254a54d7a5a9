"""How each server of a comparison is started: Deskside, llama-server and llama-cpp-python's own server."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from models.gguf.header import read_meta

from .local import Running, free_port, serve_command, serving
from .peer_record import Server
from .peer_tasks import DESKSIDE, LLAMA_CPP_SERVER, LLAMA_SERVER

BEST, RAM, SHIPPED = "best", "best with RAM cache", "as shipped"
# The title of the file that Deskside chose for the fine-tune, in whatever quantization.
CHOSEN = "chosen"
LLAMA_SERVER_PROFILES = {BEST: "best", RAM: "ram", SHIPPED: "shipped"}
LLAMA_SERVER_SETTINGS = {
    BEST: "16 slots, unified KV cache of 32,768 cells, swa-full, continuous batching, prompt cache in the slots, warm",
    RAM: "the same with the cache of prompts in RAM (8 GiB)",
    SHIPPED: "llama-server's own defaults: 4 slots, unified KV cache, sliding-window cache, prompt cache in RAM",
}
# Its defaults keep the logits of every prompt token, a MiB each with Gemma's whole vocabulary, and break a stream off
# as soon as another request arrives: as shipped, most of 16 clients get no whole answer.
LLAMA_CPP_FLAGS = {
    BEST: [
        *("--n_ctx", "4096", "--logits_all", "false", "--flash_attn", "true", "--n_ubatch", "512"),
        *("--interrupt_requests", "false"),
    ],
    SHIPPED: [],
}

_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file that is served, its model's folder (with the manifest), and what is known about it.

    `title` names it among the files of a comparison; the quantization does by default.
    """

    path: Path
    folder: Path
    quantization: str
    sha256: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """A server to be measured. `slow`: it answers a third of the requests; `once`: in the first repetition only.

    `ends`: the tokens that end an answer, for a server that can be kept from ending only by naming them.
    """

    facts: Server
    peer: str
    start: Callable[[Path], AbstractContextManager[Running]]
    slow: bool = False
    once: bool = False
    ends: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.facts.name


def script(name: str) -> str:
    """A file of this folder that the peers' Python runs."""
    return str(resources.files("benchmarks").joinpath(name))


def deskside_plan(file: ModelFile, threads: int) -> ServerPlan:
    """`deskside serve`: there is one configuration, the default."""

    def start(log: Path) -> AbstractContextManager[Running]:
        port = free_port()
        command = serve_command(str(file.folder), port, ["--threads", str(threads)])
        return serving(command, port, log_file=log)

    return ServerPlan(_facts(DESKSIDE, "default", "default settings", file), DESKSIDE, start)


def llama_server_plan(file: ModelFile, threads: int, profile: str, python: Path) -> ServerPlan:
    """llama-server out of the `xllamacpp` wheel, in one of LLAMA_SERVER_SETTINGS."""

    def start(log: Path) -> AbstractContextManager[Running]:
        port = free_port()
        arguments = [str(file.path), str(port), str(threads), LLAMA_SERVER_PROFILES[profile]]
        return serving([str(python), "-P", script("peer_xllamacpp.py"), *arguments], port, log_file=log)

    facts = _facts(LLAMA_SERVER, profile, LLAMA_SERVER_SETTINGS[profile], file)
    return ServerPlan(facts, LLAMA_SERVER, start, slow=profile != BEST, once=profile == SHIPPED)


def llama_cpp_plan(file: ModelFile, threads: int, profile: str, python: Path) -> ServerPlan:
    """llama-cpp-python's own server on Deskside's compiled llama.cpp. It answers one request at a time."""

    def start(log: Path) -> AbstractContextManager[Running]:
        port = free_port()
        shared = ["--host", "127.0.0.1", "--port", str(port), "--model", str(file.path)]
        shared += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
        command = [str(python), "-P", script("peer_llama_cpp.py"), *shared, *LLAMA_CPP_FLAGS[profile]]
        return serving(command, port, ready="/v1/models", log_file=log)

    settings = " ".join(LLAMA_CPP_FLAGS[profile]) or "default settings"
    facts = _facts(LLAMA_CPP_SERVER, profile, settings, file)
    return ServerPlan(facts, LLAMA_CPP_SERVER, start, slow=True, once=profile == SHIPPED, ends=end_tokens(file.path))


def end_tokens(gguf: Path) -> tuple[int, ...]:
    """The numbers that the file has for the end of text and of a turn: a cut vocabulary has its own."""
    meta = read_meta(gguf)
    return tuple(meta.number(key) for key in _ENDS if key in meta.values)


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
