"""Connections: more of them than fit, idle ones, clients that end their side of one, and those that still send."""

import json
import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from runtime.config import RuntimeConfig
from runtime.server import app, connection
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


# An early answer, and the head that gets it.
REFUSALS = {
    401: "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n",
    404: "POST /nothing HTTP/1.1\r\nHost: a\r\n",
    413: "POST /tokenize HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key\r\nContent-Type: application/json\r\n",
    415: "POST /tokenize HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer key\r\nContent-Type: text/plain\r\n",
    400: "POST\r\n",
}
# More than the buffers of both systems hold.
PART, N_PARTS = b"x" * (1 << 20), 30


def refused(client: socket.socket, head: bytes, status: int) -> None:
    """Send a body to its end after the answer is there, as clients do that read only then; and read it."""
    client.sendall(head + PART)
    assert client.recv(1, socket.MSG_PEEK)
    for _ in range(N_PARTS):
        client.sendall(PART)
    got, kind, body = answered(client)
    assert (got, kind) == (status, "application/json")
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with serving(config=RuntimeConfig(api_key="key")) as running:
        yield running


@pytest.mark.parametrize("more", ["Connection: close\r\n", "Connection: close\r\nExpect: 100-continue\r\n", ""])
@pytest.mark.parametrize("status", REFUSALS)
def test_a_client_that_is_refused_before_it_has_sent_all_may_send_it_and_reads_why(
    keyed: Running, status: int, more: str
) -> None:
    head = f"{REFUSALS[status]}{more}Content-Length: {(N_PARTS + 1) * len(PART)}\r\n\r\n"
    with connected(keyed) as client:
        refused(client, head.encode(), status)
        if not more and status != 400:  # the connection is good for another request
            client.sendall(HEALTH)
            assert answered(client)[0] == 200
        else:
            assert client.recv(1) == b""
    wait_until(lambda: not keyed.server.connections.idle)


def test_a_client_beyond_the_limit_may_send_its_body() -> None:
    with bounded(1) as (running, _), asked(running.url, CHAT, BODY), connected(running) as late:
        wait_until(lambda: running.supervisor.live == 1)
        refused(late, f"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {99 << 20}\r\n\r\n".encode(), 503)


def test_a_body_that_breaks_within_is_refused_once(keyed: Running, caplog: pytest.LogCaptureFixture) -> None:
    head = f"{REFUSALS[413]}Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n".encode()
    with connected(keyed) as client:
        refused(client, head + b"no number\r\n", 400)
    with connected(keyed) as client:  # after its answer
        client.sendall(head.replace(b"application/json", b"text/plain"))
        assert answered(client)[0] == 415
        client.sendall(b"no number\r\n" + PART)
        assert client.recv(1) == b""
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("bound", ["LINGER_BYTES", "LINGER_SECONDS", "LINGER_QUIET_SECONDS"])
def test_what_a_refused_client_sends_is_read_within_bounds(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    monkeypatch.setattr(connection, bound, 0)
    with serving() as running, connected(running) as client:
        client.sendall(
            f"POST /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {9**15}\r\n\r\n".encode()
        )
        assert answered(client)[0] == 404
        if bound != "LINGER_QUIET_SECONDS":
            client.sendall(b"x")
        wait_until(lambda: not running.server.connections.connections)


def test_a_refused_client_that_is_silent_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(connection, "LINGER_QUIET_SECONDS", 1000.0)
    with bounded(1) as (running, _), connected(running) as client:
        client.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 9\r\n\r\n")
        assert answered(client)[0] == 404
        with connected(running) as late:
            late.sendall(HEALTH)
            assert answered(late)[0] == 200


def test_an_answer_after_which_the_server_closes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the client's next request on that connection meets a reset."""

    def broken(_: object) -> object:
        raise RuntimeError("broken")

    monkeypatch.setattr(app, "asked_model", broken)
    with serving() as running:
        response = running.http.post("/tokenize", json={"content": "hi"})
        assert (response.status_code, response.headers["connection"]) == (500, "close")
        monkeypatch.undo()
        assert running.http.post("/tokenize", json={"content": "hi"}).status_code == 200
