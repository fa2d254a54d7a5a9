"""A stand-in for the Hugging Face Hub on 127.0.0.1: what its client asks for one file, and how that can fail."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = "team/tiny-GGUF"
FILE = "tiny-Q8_0.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server serves and how it misbehaves; and what it was asked."""

    content: bytes
    others: dict[str, bytes] = field(default_factory=dict)
    delivered: bytes | None = None
    drop_first_get_at: int | None = None
    gated: bool = False
    endpoint: str = ""
    heads: list[str] = field(default_factory=list)
    gets: list[str | None] = field(default_factory=list)
    first_get: threading.Event = field(default_factory=threading.Event)
    may_answer: threading.Event = field(default_factory=threading.Event)

    @property
    def sha256(self) -> str:
        """What the hub promises, whatever it delivers."""
        return hashlib.sha256(self.content).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free port while the block runs. Downloads wait while `may_answer` is cleared."""
    hub.may_answer.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            hub.heads.append(self.path)
            self._start(200, self._file(), len(self._file())) if self._known() else None

        def do_GET(self) -> None:
            if self.path.startswith("/api/models/"):
                self._describe()
                return
            if not self._known():
                return
            wanted = self.headers.get("Range")
            hub.gets.append(wanted)
            hub.first_get.set()
            assert hub.may_answer.wait(30)
            body = self._file() if hub.delivered is None else hub.delivered
            start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            self._start(206 if wanted else 200, self._file(), len(body) - start, start=start, size=len(body))
            if hub.drop_first_get_at is not None and len(hub.gets) == 1:
                self.wfile.write(body[: hub.drop_first_get_at])
                self.close_connection = True
            else:
                self.wfile.write(body[start:])

        def _known(self) -> bool:
            revision, _, path = self.path.removeprefix(f"/{REPO}/resolve/").partition("/")
            if hub.gated:
                self._fail(403, "GatedRepo")
            elif not self.path.startswith(f"/{REPO}/"):
                self._fail(404, "RepoNotFound")
            elif revision not in {"main", COMMIT}:
                self._fail(404, "RevisionNotFound")
            elif path not in {FILE, *hub.others}:
                self._fail(404, "EntryNotFound")
            else:
                return True
            return False

        def _file(self) -> bytes:
            return hub.others.get(self.path.split("/", 5)[5], hub.content)

        def _describe(self) -> None:
            """What the Hub's API says of the repository, with sizes; files with weights are kept in LFS there."""
            found = re.fullmatch(rf"/api/models/{re.escape(REPO)}/revision/(main|{COMMIT})(\?.*)?", self.path)
            if not found:
                self._fail(404, "RepoNotFound")
                return
            files = {FILE: hub.content} | hub.others
            siblings = [_sibling(name, content) for name, content in files.items()]
            body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _start(self, status: int, whole: bytes, length: int, *, start: int = 0, size: int = 0) -> None:
            self.send_response(status)
            self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(length))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Nothing on the tests' stderr."""

    return Handler


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    made: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
    if name.endswith((".gguf", ".safetensors")):
        made["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return made
