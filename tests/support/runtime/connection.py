"""A client down to its socket: it has asked and not read yet, and is gone the moment its connection is closed.

The libraries do not show when they leave: `next(response.iter_lines())` of httpx drops its iterator, and with that the
connection; a time-out may come before the server has read the request.
"""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit


@contextmanager
def asked(url: str, path: str, body: Mapping[str, Any], *, buffer_bytes: int = 0) -> Iterator[socket.socket]:
    """A connection on which `body` was posted to `path`; the client leaves when the block ends.

    `buffer_bytes`, if given, is all that the system receives for a client that does not read.
    """
    where = urlsplit(url)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.socket() as connection:
        if buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        connection.connect((where.hostname, where.port))
        connection.sendall(head.encode() + content)
        yield connection


def answered(connection: socket.socket) -> tuple[int, str, bytes]:
    """Status, content type and body of the response, read to its end."""
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, response.getheader("content-type", ""), response.read()
