"""`deskside task check` counts the tokens of an installed base, where there is one."""

import json
from pathlib import Path

import pytest

from models.common.files import sha256_file
from models.manifest import Artefact, Manifest, dump_manifest
from models.task.new import NewTask, make_task
from runtime.cli import task as task_cli
from runtime.cli.main import main
from runtime.llama.model import load_tokenizer
from tests.support.convert.tiny import write_model
from tests.support.models.tasks import csv_file, rows

LONG = "word " * 1000


@pytest.fixture(autouse=True)
def mails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    make_task(NewTask("mails", csv_file(tmp_path, [*rows(60), (LONG, "billing")])))


def kinds(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, str]:
    with pytest.raises(SystemExit):
        main(["task", "check", "mails", "--json", *options])
    found = json.loads(capsys.readouterr().out)["findings"]
    return {one["kind"]: " ".join([one["what"], *one["examples"]]) for one in found}


def test_tokens_of_a_base_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "long texts" not in kinds(capsys), "5,000 characters are not too many"
    base = write_model(tmp_path / "base.gguf", "llama")
    n = len(load_tokenizer(base).encode(LONG.strip(), add_special=False, parse_special=False))
    told = kinds(capsys, "--base", str(base))["long texts"]
    assert "more than 512 tokens" in told
    assert f"{n:,} tokens: word word" in told


def test_tokens_of_the_default_base_if_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    folder = tmp_path / "home" / "models" / task_cli.DEFAULT_BASE
    folder.mkdir(parents=True)
    base = write_model(folder / "base.gguf", "llama")
    made = Artefact(file=base.name, quantization="F32", size_bytes=base.stat().st_size, sha256=sha256_file(base))
    manifest = Manifest(name=task_cli.DEFAULT_BASE, licence="none", artefacts=(made,))
    (folder / "model.toml").write_text(dump_manifest(manifest))
    assert "more than 512 tokens" in kinds(capsys)["long texts"]


def test_a_base_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["task", "check", "mails", "--base", "nothing"])
    assert leaving.value.code == 1
    assert "no model named 'nothing' is installed" in capsys.readouterr().err
