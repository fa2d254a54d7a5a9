"""`deskside batch` from the command line to the exit code, on the toy model."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.manifest import Base
from models.store.store import Store, StoredModel
from runtime.batch import run as batch_command
from runtime.cli.main import main
from runtime.config import RuntimeConfig
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import DecodeFailed
from runtime.llama.interface import Batch
from runtime.prompt.prompter import Prompter
from runtime.serving.model import ServedModel
from tests.runtime.serving.test_names import GGUF, install, sha
from tests.support.models.gguf_heads import LORA, head
from tests.support.runtime.engine_thread import supervise
from tests.support.runtime.fakes import FAKE_TEMPLATE, FakeLlama

Run = Callable[..., int]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How the toy model is to be made by the next command: FakeLlama's arguments."""
    arguments: dict[str, Any] = {}

    def load_model(stored: StoredModel, config: RuntimeConfig, adapters: Mapping[str, Path]) -> ServedModel:
        llama = FakeLlama(adapters=tuple(adapters), **arguments)
        supervisor = supervise(Engine(llama, EngineOptions()), slots=config.slots, queue=config.queue)
        supervisor.start()
        prompter = Prompter(llama.tokenizer, FAKE_TEMPLATE, llama.info.n_ctx)
        grammars = Grammars(llama.tokenizer)
        return ServedModel(stored.name, None, supervisor, prompter, llama.tokenizer, llama.info, grammars)

    monkeypatch.setattr(batch_command, "load_model", load_model)
    return arguments


@pytest.fixture
def batch(tmp_path: Path, toy: dict[str, Any]) -> Run:
    """Run `deskside batch in.jsonl out.jsonl …` and return the exit code."""
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")

    def run(*options: str, lines: int = 20, bad: str = "", model: str = str(tmp_path / "toy.gguf")) -> int:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        records = [json.dumps(request | {"custom_id": f"r{n}"}) for n in range(lines)]
        (tmp_path / "in.jsonl").write_text("\n".join([*records, bad]))
        files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
        with pytest.raises(SystemExit) as leaving:
            main(["batch", *files, "--model", model, *options])
        assert isinstance(leaving.value.code, int)
        return leaving.value.code

    return run


def test_done_is_0_and_the_summary_is_on_stdout(batch: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("--json") == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["model"], summary["answered"], summary["failed"]) == ("toy", 20, 0)
    assert err.startswith("20 answered, 0 failed")
    assert batch("--json") == 0
    assert json.loads(capsys.readouterr().out)["answered_before"] == 20


def test_a_model_replaced_under_its_name_is_refused(
    batch: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch() == 0
    (tmp_path / "toy.gguf").write_bytes(b"GGUF, trained again")
    assert batch() == 1
    assert "other files than those that 'toy' has now" in capsys.readouterr().err


def test_without_json_stdout_is_empty(batch: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch() == 0
    assert capsys.readouterr().out == ""


def test_a_failed_line_is_3(batch: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(bad="{") == 3
    assert "20 answered, 1 failed (see " in capsys.readouterr().err
    assert json.loads((tmp_path / "out.errors.jsonl").read_text())["line"] == 21


def test_files_that_cannot_be_used_are_1(batch: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("my notes\n")
    assert batch() == 1
    assert capsys.readouterr().err.startswith("error: '")


def test_an_engine_that_breaks_is_1(batch: Run, toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    toy["fail_at"] = {3: DecodeFailed("fatal")}
    assert batch() == 1
    assert "error: the engine stopped: fatal\n" in capsys.readouterr().err
    toy.clear()
    assert batch() == 0


def test_an_adapter_answers_on_its_base_in_its_own_words(
    batch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    template = "{{ bos_token }}Mail: {{ messages[0]['content'] }}"
    install(Store(), "base", GGUF)
    adapter = head({**LORA, "tokenizer.chat_template": template})
    install(Store(), "mail", adapter, kind="adapter", base=Base(name="base", sha256=sha(GGUF)))
    used, decode = [], FakeLlama.decode

    def noting(llama: FakeLlama, batch: Batch) -> np.ndarray:
        used.append((llama.adapter, llama.tokenizer.decode(batch.tokens.tolist())))
        return decode(llama, batch)

    monkeypatch.setattr(FakeLlama, "decode", noting)
    assert batch("--json", model="base:mail") == 0
    assert json.loads(capsys.readouterr().out)["model"] == "base:mail"
    assert {adapter for adapter, _ in used} == {"mail"}
    assert used[0][1].startswith("Mail: hello")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {answer["response"]["body"]["model"] for answer in answers} == {"base:mail"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_130_and_the_next_run_goes_on(
    batch: Run, toy: dict[str, Any], sent: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def send(number: int, _: object) -> None:
        if number == 8:
            os.kill(os.getpid(), sent)

    toy["on_decode"] = send
    assert batch("--json", "--slots", "2", lines=200) == 130
    out, err = capsys.readouterr()
    first = json.loads(out)
    assert first["interrupted"]
    assert first["answered"] < 200
    assert "rerun the same command to resume" in err
    toy.clear()
    assert batch("--json", lines=200) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered_before"], summary["answered"]) == (first["answered"], 200 - first["answered"])
