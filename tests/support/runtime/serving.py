"""A real server on a free port of 127.0.0.1 over toy models: the way every HTTP test reaches the code."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai

from models.manifest import Manifest
from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.pool.pool import ModelPool, PoolOptions
from runtime.pool.slot import MemoryNeed, ModelSlot
from runtime.prompt.prompter import Prompter
from runtime.requests import Work
from runtime.server.app import create_app
from runtime.server.connection import MOST_CONNECTIONS, Connections
from runtime.server.serve import DrainingServer, listen, url_of
from runtime.serving.model import ServedModel
from runtime.serving.names import ModelRef
from runtime.worker.process import EngineProcess
from runtime.worker.supervisor import EngineSupervisor, SupervisorLimits

from .engine_thread import NO_RESTART, EngineThread
from .fakes import FakeLlama
from .observed import ObservedSupervisor

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
    """A server that runs in a thread of this process. `served` and `llama` are its first model."""

    url: str
    pool: ModelPool
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
    def supervisor(self) -> EngineSupervisor:
        """The engine's owner."""
        return self.served.supervisor


class Toys:
    """Toy models by name, loaded as often as a pool asks for them.

    `make` gives each its model; `made` holds those that were loaded, in order, and `submitted` all requests.
    `on_load` is called before each load with the name, in the thread that loads, and may block or raise.
    """

    def __init__(
        self,
        make: Mapping[str, Callable[[], FakeLlama]],
        config: RuntimeConfig | None = None,
        on_load: Callable[[str], None] = lambda _: None,
        manifests: Mapping[str, Manifest] | None = None,
        process: EngineProcess | None = None,
    ) -> None:
        self.config = config or RuntimeConfig(slots=4, queue=8)
        self.made: list[tuple[str, FakeLlama]] = []
        self.submitted: list[Work] = []
        self.on_load = on_load
        self._make = make
        self._manifests = manifests or {}
        self._process = process

    def stored(self, name: str) -> StoredModel:
        """Where the toy would lie."""
        return StoredModel(name, Path(), self._manifests.get(name), Path(f"{name}.gguf"))

    def slot(self, name: str, *, needs: int = 1, adapters: Iterable[ModelRef] = ()) -> ModelSlot:
        """A toy that is not loaded, and claims to need so many bytes."""
        stored = self.stored(name)
        return ModelSlot(stored, (ModelRef(name, stored), *adapters), MemoryNeed(needs, 512, 0, 0, 0, overhead=0))

    def load(self, stored: StoredModel, _: Mapping[str, Path]) -> ServedModel:
        """A pool's loader."""
        self.on_load(stored.name)
        llama = self._make[stored.name]()
        self.made.append((stored.name, llama))
        grammars = Grammars(llama.tokenizer)
        limits = SupervisorLimits(slots=self.config.slots, queue=self.config.queue)
        process = self._process
        if process is None:
            process = EngineThread(Engine(llama, EngineOptions(max_running=limits.slots), grammars))
            limits = replace(limits, restarts=NO_RESTART)
        supervisor = ObservedSupervisor(process, limits, self.submitted)
        supervisor.start()
        return ServedModel(
            name=stored.name,
            manifest=stored.manifest,
            supervisor=supervisor,
            prompter=Prompter(llama.tokenizer, llama.info.chat_template, llama.info.n_ctx),
            tokenizer=llama.tokenizer,
            grammars=grammars,
            info=llama.info,
            target=self.config.target,
        )


@contextmanager
def serving(
    llama: FakeLlama | None = None,
    config: RuntimeConfig | None = None,
    manifest: Manifest | None = None,
    process: EngineProcess | None = None,
) -> Iterator[Running]:
    """Serve `llama` under the name `toy` until the block ends. A `process` runs its own engine, and `llama` none."""
    toy = llama or FakeLlama(script="hello")
    toys = Toys({"toy": lambda: toy}, config, manifests={} if manifest is None else {"toy": manifest}, process=process)
    with serving_toys(toys, [toys.slot("toy")]) as running:
        yield running


@contextmanager
def serving_toys(toys: Toys, slots: Sequence[ModelSlot], **options: Any) -> Iterator[Running]:
    """Serve several toys until the block ends; `options` are those of the pool. The first is loaded at the start."""
    capacity = toys.config.slots + toys.config.queue
    pool = ModelPool(slots, toys.load, PoolOptions(capacity=capacity, **options))
    pool.load_at_start()
    first = slots[0].loaded
    assert first is not None
    listener = listen("127.0.0.1", 0)
    server = DrainingServer(create_app(pool, toys.config), pool, toys.config, "toys", Connections(MOST_CONNECTIONS))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    declared = {"content-type": "application/json"}  # for bodies that a test writes itself
    with httpx.Client(base_url=url_of(listener), headers=declared, timeout=PATIENCE_S) as http:
        running = Running(url_of(listener), pool, first.base, server, toys.made[0][1], http)
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
