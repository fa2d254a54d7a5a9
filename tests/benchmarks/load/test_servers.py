"""A server started for a benchmark is waited for, reported when it fails, and stopped by its process id."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.errors import ServerFailed
from benchmarks.load.servers import free_port, serve_command, serving

ROOT = Path(__file__).parents[3]
HEALTHY = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_ready_inside_the_block_and_gone_after_it() -> None:
    port = free_port()
    with serving([sys.executable, "-c", HEALTHY, str(port)], port) as server:
        assert server.base_url == f"http://127.0.0.1:{port}/v1"
        assert server.start_s > 0
        pid = int(httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).text)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_stops_is_reported_with_its_own_words() -> None:
    script = "import sys; print('no such model'); sys.exit(7)"
    with (
        pytest.raises(ServerFailed, match=r"(?s)exit code 7.*no such model"),
        serving([sys.executable, "-c", script], 9),
    ):
        raise AssertionError("unreachable")


def test_a_server_that_never_gets_ready_is_stopped() -> None:
    script = "import time; print('thinking', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script]
    with pytest.raises(ServerFailed, match="not ready"), serving(command, free_port(), timeout_s=0.3):
        raise AssertionError("unreachable")


def test_a_terminated_benchmark_leaves_no_server_behind() -> None:
    port = free_port()
    script = (
        "import sys, time; from benchmarks.load.servers import serving\n"
        f"with serving([sys.executable, '-c', {HEALTHY!r}, '{port}'], {port}): print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        pid = int(httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).text)
        child.terminate()
        assert child.wait(20) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_command_is_the_one_beside_this_python() -> None:
    command = serve_command("email-triage", 4711, ["--slots", "4"])
    assert command[0].endswith("deskside")
    assert command[1:] == ["serve", "email-triage", "--host", "127.0.0.1", "--port", "4711", "--slots", "4"]
