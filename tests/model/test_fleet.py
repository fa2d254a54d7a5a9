"""Two real models in room for one: each request brings its own model in, and puts the other out."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models.store import Store, StoredModel
from runtime.config import RuntimeConfig
from runtime.fleet_open import open_fleet

pytestmark = pytest.mark.model

FLAGS = {"slots": "2", "context": "1024", "threads": "1"}


@pytest.fixture
def http(base_gguf: Path, email_triage: StoredModel) -> Iterator[httpx.Client]:
    """A `deskside serve` of both whose budget is a little more than the larger one needs."""
    names = [str(base_gguf.parent), str(email_triage.folder)]
    hosts = open_fleet(names, RuntimeConfig.from_text(FLAGS), Store()).hosts
    needs = [host.need.total for host in hosts]
    budget_gib = (max(needs) + min(needs) / 2) / 2**30
    flags = [word for name, value in FLAGS.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "runtime.cli", "serve", *names, "--port", "0", *flags]
    with subprocess.Popen(
        [*command, "--memory-budget", f"{budget_gib:.3f}"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            said = ""
            while "loaded when it is asked for" not in said:
                line = process.stderr.readline()
                assert line, f"deskside serve ended early and said: {said}"
                said += line
            url = said.rsplit(": ", 1)[1].strip().removesuffix("/v1")
            with httpx.Client(base_url=url, timeout=300) as client:
                yield client
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_each_request_swaps_its_model_in(http: httpx.Client) -> None:
    def loaded() -> list[str]:
        return [model["id"] for model in http.get("/v1/models").json()["data"] if model["state"] == "ready"]

    assert loaded() == ["gemma-3-270m"]
    text = {"model": "gemma-3-270m", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    mail = {"role": "user", "content": "Subject: Re: razor-check times out\n\nIt hangs on every mail."}
    question = {"model": "email-triage", "messages": [mail], "max_tokens": 8, "temperature": 0}
    written, labels = set(), set()
    for _ in range(2):
        labels.add(http.post("/v1/chat/completions", json=question).json()["choices"][0]["message"]["content"])
        assert loaded() == ["email-triage"]
        written.add(http.post("/v1/completions", json=text).json()["choices"][0]["text"])
        assert loaded() == ["gemma-3-270m"]
    assert labels == {"razor-users"}
    assert len(written) == 1, "the same model came back"
