"""Connections: more of them than fit, idle ones, and clients that end their side of one."""

import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from runtime.config import RuntimeConfig
from runtime.server import connection
from runtime.server.connection import FEWEST_CONNECTIONS, KEEP_ALIVE_SECONDS, connection_limit
from tests.support.runtime.connection import answered, asked
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.observed import Observed
from tests.support.runtime.serving import Gate, Running, serving, wait_until

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connected(running: Running) -> socket.socket:
    """A connection on which nothing was sent."""
    return socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1])))


def is_cut(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


@contextmanager
def bounded(limit: int) -> Iterator[tuple[Running, Gate]]:
    """A server with room for so many connections, whose engine waits at the gate."""
    gate = Gate()
    with serving(FakeLlama(script="hello", on_decode=gate), RuntimeConfig(slots=8)) as running:
        running.server.connections.limit = limit
        try:
            yield running, gate
        finally:
            gate.open()


def test_idle_connections_are_kept_longer_than_pools_keep_theirs() -> None:
    with serving() as running:
        assert running.server.config.timeout_keep_alive == KEEP_ALIVE_SECONDS == 75


def test_beyond_the_limit_a_newcomer_gets_a_503_and_the_others_their_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with bounded(3) as (running, gate), ExitStack() as stack:
        busy = [stack.enter_context(asked(running.url, CHAT, BODY)) for _ in range(3)]
        wait_until(lambda: running.supervisor.live == 3)
        with caplog.at_level(logging.WARNING, "deskside.server"):
            for _ in range(20):
                with connected(running) as late:
                    late.sendall(HEALTH)
                    status, kind, body = answered(late)
                    assert (status, kind) == (503, "application/json")
                    assert json.loads(body)["error"]["code"] == "server_full"
        assert [record.message for record in caplog.records if "connections are open" in record.message] == [
            "3 connections are open, the limit; others are refused (further ones within a minute are not logged)"
        ]
        gate.open()
        assert [answered(client)[0] for client in busy] == [200] * 3


def test_far_beyond_the_limit_newcomers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TOLD", 2)
    with bounded(1) as (running, _), ExitStack() as stack:
        stack.enter_context(asked(running.url, CHAT, BODY))
        wait_until(lambda: running.supervisor.live == 1)
        silent = [stack.enter_context(connected(running)) for _ in range(2)]
        wait_until(lambda: len(running.server.connections.connections) == 3)
        assert is_cut(stack.enter_context(connected(running)))
        silent[0].sendall(HEALTH)
        assert answered(silent[0])[0] == 503


def test_the_connection_that_idles_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_IDLE_SECONDS", 0.0)
    with bounded(3) as (running, gate), ExitStack() as stack:
        busy = stack.enter_context(asked(running.url, CHAT, BODY))
        wait_until(lambda: running.supervisor.live == 1)
        # One has sent half a head, which is no request yet; the other has had an answer.
        half, used = (stack.enter_context(connected(running)) for _ in range(2))
        half.sendall(HEALTH[:20])
        used.sendall(HEALTH)
        assert answered(used)[0] == 200
        for left in (half, used):
            with connected(running) as late:
                late.sendall(HEALTH)
                assert answered(late)[0] == 200
                assert is_cut(left)
            wait_until(lambda: len(running.server.connections.connections) < 3)
            stack.enter_context(connected(running))
        gate.open()
        assert answered(busy)[0] == 200


def test_the_limit_leaves_descriptors_for_all_else() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, hard), hard))
        limit = connection_limit()
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised > min(400, hard - 1)
        assert FEWEST_CONNECTIONS <= limit < raised - 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_accept_that_fails_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """As asyncio meets it when all descriptors are taken in spite of the bound."""
    with serving() as running, ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        clients = [stack.enter_context(socket.socket()) for _ in range(8)]
        taken = max(client.fileno() for client in clients)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 1, hard))
            address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
            for client in clients:
                client.connect(address)
            clients[0].sendall(HEALTH)
            wait_until(lambda: any("was not accepted" in record.message for record in caplog.records))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert answered(clients[0])[0] == 200
        assert sum("accept" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_ends_its_side_after_asking_is_answered(stream: bool) -> None:
    with bounded(100) as (running, gate), asked(running.url, CHAT, BODY | {"stream": stream}) as client:
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: running.supervisor.live == 1)
        gate.open()
        status, _, body = answered(client)
        assert status == 200
        assert (b"data: [DONE]" if stream else b'"content":"hello"') in body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_first_token_is_not_answered(stream: bool) -> None:
    with bounded(100) as (running, gate):
        observed = Observed(running.supervisor)
        with asked(running.url, CHAT, BODY | {"stream": stream}) as client:
            gate.wait()
            if stream:
                assert b"200 OK" in client.recv(10_000)
        wait_until(lambda: len(observed.cancelled) == 1)


def test_a_client_that_leaves_within_its_body_is_not_waited_for() -> None:
    with serving() as running, connected(running) as client:
        client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 90\r\n\r\n{")
        wait_until(lambda: not running.server.connections.idle)
        client.shutdown(socket.SHUT_WR)
        assert is_cut(client)


def test_what_is_no_http_is_refused_in_the_shape_of_every_error() -> None:
    with serving() as running, connected(running) as client:
        client.sendall(b"hello\r\n\r\n")
        status, kind, body = answered(client)
        assert (status, kind) == (400, "application/json")
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
