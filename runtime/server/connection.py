"""Connections: how many there may be, how long one may idle, how one ends before either side has read what was sent.

Each connection takes a file descriptor. When none is left, every `accept` fails while the socket stays ready, so the
number of connections is bounded below the limit of the process. Beyond it the one that has idled longest is closed; if
none idles, the newcomer's request is answered with a 503.
"""

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from runtime.openai.wire import error_body

from .stream import PROBE, JsonBytes, encode

_log = logging.getLogger("deskside.server")

# Clients and proxies keep connections for about a minute: the server must not close first what they are about to use.
KEEP_ALIVE_SECONDS = 75
# Connections in the system's queue, and those that asyncio accepts at once, before it hands over the first.
BACKLOG, ACCEPTED_AT_ONCE = 2048, 16
# The number of newcomers beyond the limit that get an error as answer; further ones are cut.
TOLD = 32
MOST_CONNECTIONS, FEWEST_CONNECTIONS = 8192, 16
# Descriptors for engines, model files and logs, and for connections that are accepted and not counted yet.
_RESERVED = 64 + TOLD + 4 * ACCEPTED_AT_ONCE
_IDLE_SECONDS = 1.0
# A client that was refused before its body was whole may send more: so much is read, for so long at most, and for so
# long after the last of it.
LINGER_BYTES, LINGER_SECONDS, LINGER_QUIET_SECONDS = 64 << 20, 10.0, 2.0
_SAID_AGAIN_SECONDS = 60.0
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def connection_limit() -> int:
    """Raise the soft limit of file descriptors, and return the number of connections that fit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = sum(1 for _ in Path("/dev/fd").iterdir())
    wanted = n_open + _RESERVED + MOST_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    free = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - n_open - _RESERVED
    return max(FEWEST_CONNECTIONS, min(free, MOST_CONNECTIONS))


class Connections(ServerState):
    """The connections of a server, at most `limit`; `idle`: those without a request, and since when, longest first."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.idle: dict[Connection, float] = {}
        self._said_s = -_SAID_AGAIN_SECONDS

    def close_longest_idle(self) -> bool:
        """Close the connection that has idled longest. False if none idles for long enough to be left."""
        connection, since_s = next(iter(self.idle.items()))
        if time.monotonic() - since_s < _IDLE_SECONDS:
            return False
        self.connections.discard(connection)
        connection.leave()
        return True

    def say(self, message: str) -> None:
        """Log `message`, then nothing like it for a minute: a client that causes it can cause it often."""
        now_s = time.monotonic()
        if now_s - self._said_s >= _SAID_AGAIN_SECONDS:
            self._said_s = now_s
            _log.warning("%s (further ones within a minute are not logged)", message)

    def loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An event loop's exception handler: asyncio reports every connection that it has no descriptor for."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_DESCRIPTORS:
            self.say(f"a connection was not accepted: {error.strerror}; raise the limit (ulimit -n)")
        else:
            loop.default_exception_handler(context)


class Lingering(asyncio.Transport):
    """A connection's transport. Its `close` first reads what the client still sends, if `more` says that it may.

    A system that closes a socket with bytes unread, or gets some after, sends a reset, at which the client's system
    drops the answer that the client has not read yet.
    """

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop, more: Callable[[], bool]) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._more = more
        self._closing = False
        self._left_bytes = LINGER_BYTES
        self._until_s = 0.0
        self._quiet: asyncio.TimerHandle | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, unless the transport was closed."""
        if not self._closing:
            self._inner.write(data)

    def close(self) -> None:
        """End this side once all is sent; close when the client has ended its own, or one of the bounds is reached."""
        if self._closing:
            return
        self._closing = True
        if self._inner.is_closing() or not self._more() or not self._inner.can_write_eof():
            self._inner.close()
            return
        self._inner.write_eof()
        self._inner.resume_reading()
        self._until_s = self._loop.time() + LINGER_SECONDS
        self._quiet = self._loop.call_later(LINGER_QUIET_SECONDS, self._inner.close)

    def drop(self, n_bytes: int) -> None:
        """Count what came after `close`."""
        self._left_bytes -= n_bytes
        self.end()
        if self._left_bytes < 0 or self._loop.time() > self._until_s:
            self._inner.close()
        else:
            self._quiet = self._loop.call_later(LINGER_QUIET_SECONDS, self._inner.close)

    def end(self) -> None:
        """Stop waiting for the client to be quiet."""
        if self._quiet is not None:
            self._quiet.cancel()

    def abort(self) -> None:
        """Cut the connection."""
        self._closing = True
        self._inner.abort()

    def is_closing(self) -> bool:
        """True once `close` or `abort` was called, or the client left."""
        return self._closing or self._inner.is_closing()

    def pause_reading(self) -> None:
        """Leave what comes with the system."""
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        """Take what comes again."""
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """A fact of the connection from the transport beneath."""
        return self._inner.get_extra_info(name, default)


class Connection(H11Protocol):
    """A client's connection."""

    transport: Lingering

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(server_state, Connections)
        self._all = server_state

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection in, close another for it, or refuse it."""
        super().connection_made(Lingering(transport, self.loop, self._may_get_more))
        self._all.idle[self] = time.monotonic()
        self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_SECONDS, self.timeout_keep_alive_handler)
        beyond = len(self.connections) - self._all.limit
        if beyond > 0 and not self._all.close_longest_idle():
            self._all.say(f"{self._all.limit} connections are open, the limit; others are refused")
            self.app = _answer_full
            if beyond > TOLD:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._all.idle.pop(self, None)
        self.transport.end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends. Part of a request's head does not count as a request."""
        if self.transport.is_closing():
            self.transport.drop(len(data))
            return
        super().data_received(data)
        if self._busy and not self.transport.is_closing():
            self._all.idle.pop(self, None)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if not self._busy:
            self._all.idle[self] = time.monotonic()

    def leave(self) -> None:
        """Close an idle connection, or one that was closed and lingers."""
        self._all.idle.pop(self, None)
        if self.transport.is_closing():
            self.transport.abort()
        else:
            self.timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP in the shape of every other error, unless the request has its answer."""
        if self._busy:
            # For its handler, a client that broke its request has left.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._all.idle[self] = time.monotonic()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = encode(error_body(msg, "invalid_request_error", None, "invalid_http"))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        head = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that ended its side once its request was whole. One that left altogether ends it too.

        A client that still reads ignores a few bytes; the system of one that left rejects them, which shows soon after.
        HTTP/1.0 has no such bytes before an answer: a proxy that speaks it ends its side only when it leaves.
        """
        if not self._busy or self.cycle.more_body:
            return False
        if self.cycle.response_started:
            self.transport.write(self.conn.send(h11.Data(data=self.scope["state"].get(PROBE, b""))) or b"")
        elif self.scope["http_version"] == "1.0":
            return False
        else:
            self.transport.write(
                self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b""
            )
        self.cycle.keep_alive = False
        self.loop.call_later(0.02, self._look, 0.02)
        return True

    def _look(self, waited_s: float) -> None:
        """Cut the connection if the client's system rejected what was sent; look again as long as it did not."""
        if self.transport.is_closing() or not self._busy:
            return
        client: socket.socket = self.transport.get_extra_info("socket")
        if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            pause_s = min(2 * waited_s, 1.0)
            self.loop.call_later(pause_s, self._look, pause_s)

    def _may_get_more(self) -> bool:
        """True unless all that the client sent was read, and the request that it sent is whole."""
        whole = self.conn.their_state in (h11.IDLE, h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        return not whole or bool(self.conn.trailing_data[0])

    @property
    def _busy(self) -> bool:
        """True while a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete


async def _answer_full(scope: Scope, receive: Receive, send: Send) -> None:
    body = error_body("the server has as many connections as it can; try again", "server_error", None, "server_full")
    await JsonBytes(body, 503, {"retry-after": "1", "connection": "close"})(scope, receive, send)
