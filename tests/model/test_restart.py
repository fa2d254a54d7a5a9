"""`deskside serve` with the installed model, its engine killed while many clients wait for their answers."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.errors import LoadFailed
from runtime.kv_cache.prefix_cache import ALIGN
from runtime.serving.model import load_model
from tests.support.runtime.engine_process import alive
from tests.support.runtime.prefixes import files
from tests.support.runtime.serving import wait_until

from .test_server import CHAT, Server, endless, mails, serve

pytestmark = pytest.mark.model


def engine_of(server: Server) -> int:
    """The process id of the server's engine, whichever thread has started it."""
    threads = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    [child] = [int(child) for file in threads for child in file.read_text().split()]
    return child


def test_eight_clients_survive_a_kill_of_the_engine(email_triage: StoredModel) -> None:
    assert email_triage.manifest is not None
    with serve(email_triage, "--slots", "4") as server, ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{server.greeting['url']}/v1", api_key="none", max_retries=0, timeout=120)

        def label(mail: list[dict[str, str]]) -> str | None:
            asked: Any = mail[:1]
            made = client.chat.completions.create(model="email-triage", messages=asked, temperature=0, max_tokens=16)
            return made.choices[0].message.content

        def stream(mail: list[dict[str, str]]) -> str:
            """`whole`, or `failed` in an error event."""
            asked: Any = mail[:1]
            try:
                chunks = client.chat.completions.create(
                    model="email-triage", messages=asked, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
                )
                last = [chunk.choices[0].finish_reason for chunk in chunks][-1]
            except openai.APIError as error:
                return "failed" if "SIGKILL" in str(error) else str(error)
            assert last == "length"
            return "whole"

        asked = mails(8)
        streams = [pool.submit(stream, mail) for mail in asked[4:]]
        wait_until(lambda: server.accepted() == 4)
        labels = [pool.submit(label, mail) for mail in asked[:4]]
        wait_until(lambda: server.accepted() >= 5)
        os.kill(engine_of(server), signal.SIGKILL)
        assert all(answer.result() for answer in labels)  # which, may hang on a tie and the batch's shape
        assert {answer.result() for answer in streams} <= {"whole", "failed"}
        health = server.http.get("/health")
        assert (health.status_code, health.json()["restarts"], health.json()["accepted"]) == (200, 1, 0)
        assert label(asked[0]) in email_triage.manifest.labels
        assert re.search(
            r"^deskside_engine_restarts_total\{[^}]*\} 1\.0", server.http.get("/metrics").text, re.MULTILINE
        )
        client.close()


@pytest.mark.parametrize("end", ["killed", "two signals"])
def test_no_engine_outlives_its_server(email_triage: StoredModel, end: str) -> None:
    with serve(email_triage, "--slots", "2") as server, server.http.stream("POST", CHAT, json=endless(2000)) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
        engine = engine_of(server)
        if end == "killed":
            server.process.kill()
        else:
            server.process.send_signal(signal.SIGINT)
            with httpx.Client(base_url=server.greeting["url"], timeout=60) as other:
                wait_until(lambda: other.get("/health").status_code == 503)
            server.process.send_signal(signal.SIGINT)
        wait_until(lambda: not alive(engine))


def test_a_model_file_that_has_gone_ends_the_server_with_the_reason(email_triage: StoredModel, tmp_path: Path) -> None:
    for file in email_triage.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    link = tmp_path / email_triage.gguf.name
    with serve(StoredModel("gone", tmp_path, None, link), "--slots", "2") as server:
        link.unlink()
        os.kill(engine_of(server), signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert server.process.stderr is not None
        said = server.process.stderr.read()
    assert link.name in said.splitlines()[-1]
    assert "No such file" in said.splitlines()[-1]


def test_llama_cpps_own_reason_is_told_for_weights_that_are_cut_off(email_triage: StoredModel, tmp_path: Path) -> None:
    """The vocabulary, which the server's process reads, is whole."""
    cut = tmp_path / "cut.gguf"
    with email_triage.gguf.open("rb") as whole:
        cut.write_bytes(whole.read(email_triage.gguf.stat().st_size // 2))
    with pytest.raises(LoadFailed, match=r"cut\.gguf' cannot be loaded: .*(data|bounds|corrupted|incomplete)"):
        load_model(StoredModel("cut", tmp_path, None, cut), RuntimeConfig(slots=2))
    command = [sys.executable, "-m", "runtime.cli.main", "serve", str(cut), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cut.gguf" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_restarted_server_goes_on_where_the_last_was(email_triage: StoredModel, tmp_path: Path) -> None:
    """The first is killed: its engine has some seconds to write what it holds."""
    talk = "\n\n".join(mail[0]["content"] for mail in mails(6))
    body = {"messages": [{"role": "user", "content": talk}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answers = []
    for _ in range(2):
        with serve(email_triage, "--slots", "2", "--prefix-disk", str(tmp_path)) as server:
            answers.append(server.http.post(CHAT, json=body).json())
        wait_until(lambda: len(files(tmp_path)) == 1)
    first, second = answers
    assert second["choices"] == first["choices"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["usage"]["prompt_tokens"] - second["usage"]["prompt_tokens_details"]["cached_tokens"] <= ALIGN + 2
