"""Real models behind one server: two in room for one, which swap; and a base with its adapter, which share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from models.common.files import sha256_file
from models.manifest import MANIFEST_FILE, Artefact, Base, Manifest, dump_manifest
from models.store.store import Store, StoredModel
from runtime.config import RuntimeConfig
from runtime.pool.pool import open_pool

from .lora_gguf import write_adapter

pytestmark = pytest.mark.model

# By default the memory for prefixes follows the memory budget, which a test here sets to what the models need.
FLAGS = {"slots": "2", "context": "1024", "threads": "1", "prefix_memory": "0"}


@contextmanager
def serve(names: list[str], *more: str, home: Path | None = None) -> Iterator[tuple[httpx.Client, str]]:
    """A `deskside serve` of `names`, with what it says at its start, up to the line about the last of them."""
    flags = [word for name, value in FLAGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-m", "runtime.cli.main", "serve", *names, "--port", "0", *flags, *more]
    environment = os.environ | ({} if home is None else {"DESKSIDE_HOME": str(home)})
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            said = ""
            while said.count("/v1\n") < len(names):
                line = process.stderr.readline()
                assert line, f"deskside serve ended early and said: {said}"
                said += line
            url = said.rsplit(": ", 1)[1].strip().removesuffix("/v1")
            with httpx.Client(base_url=url, timeout=300) as client:
                yield client, said
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_each_request_swaps_its_model_in(base_gguf: Path, email_triage: StoredModel) -> None:
    names = [str(base_gguf.parent), str(email_triage.folder)]
    needs = [slot.need.total for slot in open_pool(names, RuntimeConfig.model_validate(FLAGS), Store()).slots]
    budget_gib = (max(needs) + min(needs) / 2) / 2**30
    with serve(names, "--memory-budget", f"{budget_gib:.3f}") as (http, said):
        assert "email-triage is loaded on its first request" in said
        require_swaps(http)


def require_swaps(http: httpx.Client) -> None:
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


def test_a_base_and_its_adapter_answer_side_by_side(base_gguf: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    base = Base(name="gemma-3-270m", sha256=sha256_file(base_gguf))
    with store.staging("triage") as folder:
        file = write_adapter(folder / "triage.gguf")
        artefact = Artefact(
            file=file.name, quantization="F32", size_bytes=file.stat().st_size, sha256=sha256_file(file)
        )
        made = Manifest(kind="adapter", name="triage", licence="Gemma", base=base, artefacts=(artefact,))
        (folder / MANIFEST_FILE).write_text(dump_manifest(made), encoding="utf-8")
    prompt = (
        "<start_of_turn>user\nSubject: Re: razor-check\n\nIt hangs on every mail.<end_of_turn>\n<start_of_turn>model\n"
    )
    plain, adapted = base_gguf.stem, f"{base_gguf.stem}:triage"
    with serve([str(base_gguf), f"{base_gguf}:triage"], home=tmp_path) as (http, said):
        assert f"{adapted} (LoRA adapter" in said
        listed = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
        assert (listed[adapted]["parent"], listed[plain]["parent"]) == (plain, None)

        def written(model: str) -> str:
            body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
            return str(http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(written, [plain, adapted, plain, adapted]))
        assert answers[1] == answers[3] == "razor-users"
        assert "razor-users" not in (answers[0], answers[2])
