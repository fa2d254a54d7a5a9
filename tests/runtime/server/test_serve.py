"""What the server says at its start and at its front door: a command that works as it is pasted."""

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from runtime.config import RuntimeConfig
from runtime.server.models import chats, example
from runtime.server.serve import next_steps, program
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import serving


def run(command: str, **environment: str) -> str:
    """What a shell prints for a pasted line."""
    return subprocess.run(
        command, shell=True, env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("key", ["", "sesame 'n \"so"])
@pytest.mark.parametrize("template", [True, False])
def test_the_last_words_at_the_start_work_as_they_are_pasted(template: bool, key: str) -> None:
    llama = FakeLlama(script="hello")
    llama.info = llama.info if template else replace(llama.info, chat_template=None)
    config = RuntimeConfig(slots=2, api_key=key)
    with serving(llama, config) as running:
        *_, command, last = next_steps(running.pool, config, running.url, "bin/deskside").splitlines()
        assert command.startswith("  curl ")
        assert '"hello"' in run(command, DESKSIDE_API_KEY=key)
        assert f"{running.url}/docs" in last
        assert ("bin/deskside chat toy" in last) == template == chats(*running.pool.find(None))


def test_an_address_for_all_interfaces_is_none_to_ask() -> None:
    with serving() as running:
        for url, here in (("http://0.0.0.0:80", "http://127.0.0.1:80"), ("http://[::]:80", "http://[::1]:80")):
            assert shlex.split(example(running.pool, here, keyed=False))[2] == f"{here}/v1/chat/completions"
            assert url not in next_steps(running.pool, RuntimeConfig(), url, "deskside")


def test_the_front_page_says_what_is_here_and_how_to_ask() -> None:
    with serving() as running:
        page = running.http.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert running.http.head("/").status_code == 200
        assert f"{running.url}/v1 as base URL" in page.text
        command = next(line for line in page.text.splitlines() if line.startswith("curl "))
        assert '"hello"' in run(command)
        paths = {line.split()[0] for line in page.text.splitlines() if line.startswith("http")}
        assert paths == {f"{running.url}/{name}" for name in ("docs", "health", "metrics")}
        for path in paths:
            assert running.http.get(path).status_code == 200


def test_the_program_is_named_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for called, named in ((".venv/bin/deskside", ".venv/bin/deskside"), ("/x/main.py", "deskside")):
        monkeypatch.setattr(sys, "argv", [called])
        assert program() == named
