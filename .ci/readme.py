"""Runs the README as a reader would: its `sh` and `python` blocks, in order, in one folder.

A block that only says `make serve` is started in the background, waited for, and stopped at the end.
Blocks of other kinds (`text`, `json`) are for reading.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HEALTH = "http://127.0.0.1:8080/health"
START_SECONDS = 1800
BLOCK_SECONDS = 1200


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"`make serve` ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(HEALTH, timeout=5) as answer:
                if json.load(answer)["ready"]:
                    return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"`make serve` was not ready after {START_SECONDS} s")


def main(readme: Path) -> int:
    servers: list[subprocess.Popen[bytes]] = []
    path = f"{Path('.venv/bin').resolve()}{os.pathsep}{os.environ['PATH']}"
    try:
        for kind, code in blocks(readme.read_text(encoding="utf-8")):
            print(f"--- README, {kind}\n{code}", flush=True)
            if code.strip() == "make serve":
                servers.append(subprocess.Popen(["make", "serve"], start_new_session=True))
                wait_until_ready(servers[-1])
                continue
            command = ["bash", "-euo", "pipefail", "-c", code] if kind == "sh" else [".venv/bin/python", "-c", code]
            subprocess.run(command, check=True, timeout=BLOCK_SECONDS, env={**os.environ, "PATH": path})
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=60)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
