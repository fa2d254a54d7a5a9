"""A real server on a free port of 127.0.0.1 over the toy model: the way every HTTP test reaches the code."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import openai
import uvicorn

from models.manifest import Manifest
from runtime.config import RuntimeConfig
from runtime.constrain import LlGuidance
from runtime.engine import Engine, EngineOptions
from runtime.prompt import Prompter
from runtime.serve import DrainingServer, listen, url_of
from runtime.served import ServedModel
from runtime.server import create_app
from runtime.worker import Worker
from runtime.worker_host import EngineHost
from tests.fakes import FakeLlama

# Bounds a hang; no verdict depends on it.
PATIENCE_S = 120.0


class Gate:
    """Holds the engine before each decode until `open` lets so many pass. `on_decode` of a FakeLlama."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)

    def __call__(self, *_: object) -> None:
        self.arrived.release()
        assert self._passes.acquire(timeout=PATIENCE_S)

    def open(self, times: int = 100_000) -> None:
        self._passes.release(times)

    def wait(self) -> None:
        """Until the engine stands before a decode."""
        assert self.arrived.acquire(timeout=PATIENCE_S)


@dataclass
class Running:
    """A server that runs in a thread of this process."""

    url: str
    served: ServedModel
    server: DrainingServer
    llama: FakeLlama
    http: httpx.Client
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        """The official client, which gives up at the first error."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S)
        self.clients.append(made)
        return made

    @property
    def worker(self) -> Worker:
        """The engine's owner."""
        return self.served.worker


@contextmanager
def serving(
    llama: FakeLlama | None = None,
    config: RuntimeConfig | None = None,
    manifest: Manifest | None = None,
    host: EngineHost | None = None,
) -> Iterator[Running]:
    """Serve `llama` under the name `toy` until the block ends. A `host` runs its own engine, and `llama` none."""
    llama, config = llama or FakeLlama(script="hello"), config or RuntimeConfig(slots=4, queue=8)
    constrainer = LlGuidance(llama.tokenizer)
    engine = Engine(llama, EngineOptions(max_running=config.slots), constrainer)
    served = ServedModel(
        name="toy",
        manifest=manifest,
        worker=Worker(host or engine, queue=config.queue, slots=config.slots),
        prompter=Prompter(llama.tokenizer, llama.info.chat_template, llama.info.n_ctx),
        tokenizer=llama.tokenizer,
        constrainer=constrainer,
        info=llama.info,
    )
    listener = listen("127.0.0.1", 0)
    settings = uvicorn.Config(create_app(served, config), log_config=None, lifespan="on", http="h11", ws="none")
    server = DrainingServer(settings, served.worker, config.drain_seconds, "toy")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    with httpx.Client(base_url=url_of(listener), timeout=PATIENCE_S) as http:
        running = Running(url_of(listener), served, server, llama, http)
        try:
            yield running
        finally:
            for client in running.clients:
                client.close()
            http.close()
            server.should_exit = True
            thread.join()


def wait_until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds; fail if it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)
