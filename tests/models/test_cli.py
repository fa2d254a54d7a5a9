"""`deskside models …`: data on stdout, JSON for scripts, our own exceptions for the front door."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from models.cli import create_app, pull_command
from models.errors import HashMismatch, ModelNotFound
from models.manifest import Adapter, Base, dump_manifest
from models.store.store import Store
from tests.support.models.build import CONTENT, artefact, fill, manifest
from tests.support.models.hub import FILE, REPO, Hub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    store = Store()
    with store.staging("tiny") as folder:
        fill(folder)
    return store


def run(*words: str) -> Result:
    return CliRunner().invoke(create_app(), words)


def run_json(*words: str) -> Any:
    return json.loads(run(*words, "--json").stdout)


def test_list_shows_what_is_installed_and_what_is_known() -> None:
    rows = {row["name"]: row for row in run_json("list")}
    assert set(rows) == {"tiny", "gemma-3-270m", "email-triage"}
    assert rows["tiny"]["state"] == "installed"
    assert (rows["tiny"]["kind"], rows["email-triage"]["kind"]) == ("model", None)
    assert rows["tiny"]["size_bytes"] == len(CONTENT)
    assert rows["email-triage"]["state"] == "not installed"
    table = run("list").stdout
    assert "tiny" in table
    assert "A tiny model" in table


def test_one_damaged_model_does_not_hide_the_others(home: Store) -> None:
    with home.staging("torn") as folder:
        fill(folder, "torn")
    home.get("torn").gguf.unlink()
    rows = {row["name"]: row for row in run_json("list")}
    assert rows["torn"]["state"] == "damaged"
    assert "tiny.gguf" in rows["torn"]["description"]
    assert rows["tiny"]["state"] == "installed"


def test_show_prints_the_model_and_where_its_card_is(home: Store, tmp_path: Path) -> None:
    shown = run("show", "tiny").stdout
    assert shown.startswith("tiny\n\nA tiny model\n")
    assert "deskside batch in.jsonl out.jsonl --model tiny" in shown
    assert "its card" not in shown, "it has none"
    described = run_json("show", "tiny")
    assert described["gguf"] == str(home.get("tiny").gguf)
    assert described["manifest"]["artefacts"][0]["sha256"] == artefact().sha256
    card = home.get("tiny").folder / "README.md"
    card.write_text("# the card that came with it\n")
    assert run("show", "tiny").stdout.endswith(f"in its card:\n{card}\n")
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(CONTENT)
    assert f"{len(CONTENT)} bytes" in run("show", str(bare)).stdout


def test_verify_reads_all_and_names_every_file_that_changed(home: Store) -> None:
    with home.staging("other") as folder:
        fill(folder, "other")
    ran = run("verify")
    assert (ran.exit_code, ran.stdout) == (0, "other: ok\ntiny: ok\n")
    for name in ("other", "tiny"):
        home.get(name).gguf.write_bytes(CONTENT[:-1] + b"!")
    ran = run("verify")
    assert isinstance(ran.exception, HashMismatch)
    assert len(str(ran.exception).splitlines()) == 2
    assert isinstance(run("verify", "gone").exception, ModelNotFound)


def test_remove_deletes(home: Store) -> None:
    ran = run("remove", "tiny")
    assert (ran.stdout, ran.stderr) == ("", "tiny: removed\n")
    assert home.names() == []
    assert isinstance(run("remove", "tiny").exception, ModelNotFound)


def test_rollback_says_what_was_swapped_and_show_what_is_kept(home: Store) -> None:
    from models.cli import rollback_command

    app = typer.Typer()
    app.command()(rollback_command)
    assert isinstance(CliRunner().invoke(app, ["tiny"]).exception, ModelNotFound)
    assert "rollback" not in run("show", "tiny").stdout
    assert run_json("show", "tiny")["previous"] is None
    with home.staging("tiny", replace=True) as folder:
        fill(folder, content=CONTENT + b"!")
    assert "The version before it: Q8_0, 0 MiB, made 20" in run("show", "tiny").stdout
    assert Path(run_json("show", "tiny")["previous"]).is_dir()
    assert [row["name"] for row in run_json("list") if row["state"] == "installed"] == ["tiny"]
    ran = CliRunner().invoke(app, ["tiny"])
    assert ran.stdout == f"tiny: {home.get('tiny').gguf}\n"
    assert ran.stderr.startswith("tiny is again Q8_0, 0 MiB, made 20")
    assert "`deskside rollback tiny` swaps them again" in ran.stderr
    assert home.get("tiny").gguf.read_bytes() == CONTENT
    assert run("remove", "tiny").stderr == "tiny: removed, with the version before it\n"


def test_pull_prints_the_path_and_no_progress_without_a_terminal(
    hub: Hub, home: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    pull_command(f"hf://{REPO}/{FILE}", name="mine")
    captured = capsys.readouterr()
    assert captured.out == f"mine: {home.get('mine').gguf}\n"
    assert captured.err == ""
    pull_command("mine", as_json=True)
    assert json.loads(capsys.readouterr().out)["name"] == "mine"


def test_the_command_line_loads_nothing_heavy() -> None:
    script = "import sys, models.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["huggingface_hub", "pydantic", "rich.table", "httpx", "numpy", "platformdirs"]
    ran = subprocess.run([sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_an_adapter_is_listed_as_one_and_its_card_says_how_to_serve_it(home: Store) -> None:
    base = Base(name="tiny", sha256=artefact().sha256)
    made = manifest("mail").model_copy(update={"kind": "adapter", "base": base, "adapter": Adapter(path="adapter")})
    with home.staging("mail") as folder:
        fill(folder, "mail")
        (folder / "model.toml").write_text(dump_manifest(made))
    assert {row["name"]: row["kind"] for row in run_json("list")}["mail"] == "adapter"
    assert "adapter" in run("list").stdout
    card = run("show", "mail").stdout
    assert "deskside serve tiny:mail" in card
    assert "applied while the base is served" in card
