"""`deskside serve`: load models, print what was loaded, answer until a signal comes, and drain before stopping."""

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from models.common.machine import mebibytes
from models.store.store import Store
from runtime.config import RuntimeConfig
from runtime.errors import EngineDown, LoadFailed
from runtime.pool.pool import ModelPool, open_pool
from runtime.pool.slot import ModelSlot
from runtime.serving.names import ModelRef
from runtime.serving.promise import require_target

from .app import create_app
from .connection import ACCEPTED_AT_ONCE, BACKLOG, KEEP_ALIVE_SECONDS, Connection, Connections, connection_limit
from .models import chats, example

INTERRUPTED = 130
# Time to send the last bytes after draining, before open connections are closed.
FLUSH_SECONDS = 5


class DrainingServer(uvicorn.Server):
    """Drains at the first signal, with the port still open so that clients get a 503; exits at the second."""

    def __init__(
        self, app: ASGIApp, pool: ModelPool, config: RuntimeConfig, greeting: str, connections: Connections
    ) -> None:
        super().__init__(_settings(app, config))
        self.server_state = self.connections = connections
        self._pool = pool
        self.broke: str | None = None
        self._drain_seconds = config.drain_seconds
        self._greeting = greeting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and print the greeting."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self.connections.loop_failed)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio takes the number that it accepts at once for this one, too
        _say(self._greeting)

    async def on_tick(self, counter: int) -> bool:
        """Exit when every engine has stopped for good, so that a service manager can start the process again."""
        if self._pool.broken:
            self.broke, self.should_exit = self._pool.last_cause, True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hand the signal to the event loop: this runs in the main thread between any two instructions."""
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            os._exit(INTERRUPTED)
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, name: str) -> None:
        _say(f"{name}: finishing accepted requests ({self._pool.live}), for {self._drain_seconds:g} s at most")
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._pool.drain(self._drain_seconds)
        self.should_exit = True


def serve(config: RuntimeConfig, names: Sequence[str], store: Store | None = None) -> None:
    """Serve models until SIGTERM or SIGINT; the first answers requests that name none. Returns once it has drained.

    Raises what `open_pool` raises, LoadFailed (also for an address in use), EngineDown if the engines stopped for good.
    """
    _set_up_logging(config.log_level)
    pool = open_pool(names, config, store or Store())
    require_target({name: ref.manifest for name, (_, ref) in pool.served.items()}, config.target)
    with listen(config.bind, config.port) as listener:
        pool.load_at_start()
        url = url_of(listener)
        greeting = f"{describe(pool, config, url)}\n{next_steps(pool, config, url, program())}"
        connections = Connections(connection_limit())
        server = DrainingServer(create_app(pool, config), pool, config, greeting, connections)
        try:
            server.run(sockets=[listener])
        finally:
            pool.close()
    if server.broke is not None:
        raise EngineDown(f"the engine stopped for good, and the server with it: {server.broke}")


def _settings(app: ASGIApp, config: RuntimeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=config.log_level == "debug",
        lifespan="on",
        http=Connection,
        ws="none",
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level == "info":  # at this level these two log nothing that users of a served model need
        for talkative in ("uvicorn.error", "deskside.llama"):
            logging.getLogger(talkative).setLevel(logging.WARNING)


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket before the model is loaded, so that a taken port fails at once. Raises LoadFailed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LoadFailed(f"cannot listen on host {host!r}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise LoadFailed(f"cannot listen on {host}:{port}: {error.strerror}; try another --port") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def describe(pool: ModelPool, config: RuntimeConfig, url: str) -> str:
    """The start-up lines, one for each name: model, backend, capacity, URL."""
    return "\n".join(_describe(slot, ref, config, url) for slot, ref in pool.served.values())


def next_steps(pool: ModelPool, config: RuntimeConfig, url: str, command: str) -> str:
    """The next steps: a request to paste, and the commands that open a conversation and the page of all routes."""
    here = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    chat = f"; {command} chat {pool.default}" if chats(*pool.find(None)) else ""
    return f"try in another terminal:\n  {example(pool, here, keyed=bool(config.api_key))}\nor: open {here}/docs{chat}"


def program() -> str:
    """The command that runs this program: `deskside`, or the path to it."""
    called = sys.argv[0]
    return called if Path(called).name == "deskside" and shutil.which("deskside") != called else "deskside"


def _describe(slot: ModelSlot, ref: ModelRef, config: RuntimeConfig, url: str) -> str:
    if slot.loaded is None:
        return f"{ref.id} is loaded on its first request (needs about {mebibytes(slot.need.total)}): {url}/v1"
    if ref.adapter is not None:
        return f"{ref.id} (LoRA adapter, {mebibytes(ref.adapter.gguf.stat().st_size)}) on {slot.name}: {url}/v1"
    served, info = slot.loaded.base, slot.loaded.base.info
    slots = f"{config.slots} slots{' (fast)' if config.fast else ''}"
    gpu = f", GPU layers {'all' if info.gpu_layers < 0 else info.gpu_layers}" if info.gpu_layers else ""
    return (
        f"{served.name} ({served.quantization}, {mebibytes(info.size_bytes)}) on {info.backend}{gpu}, "
        f"{info.n_threads} threads, {slots}, context {info.n_ctx}, loaded in {slot.loaded.load_seconds:.1f} s: {url}/v1"
    )


def _say(text: str) -> None:
    for part in text.splitlines():  # a command to paste is indented
        print(part if part.startswith(" ") else f"deskside: {part}", file=sys.stderr, flush=True)
