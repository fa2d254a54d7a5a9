"""The doctor reports facts and missing parts, each with its fix, and never fails itself."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from models.manifest import MANIFEST_FILE, Artefact, Manifest, dump_manifest
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store
from runtime.cli import doctor
from runtime.cli.doctor import Report, examine, human_bytes, print_report
from runtime.cli.main import main

Install = Callable[[str], None]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor, "llama_cpp_state", lambda: ("CPU (AVX2)", False, ""))
    return tmp_path / "home"


@pytest.fixture
def install(home: Path) -> Install:
    def install_model(name: str) -> None:
        content = b"weights"
        sha256 = hashlib.sha256(content).hexdigest()
        artefact = Artefact(file="model.gguf", quantization="Q8_0", size_bytes=len(content), sha256=sha256)
        with Store(home).staging(name) as folder:
            (folder / "model.gguf").write_bytes(content)
            manifest = Manifest(name=name, licence="none", artefacts=(artefact,))
            (folder / MANIFEST_FILE).write_text(dump_manifest(manifest))

    return install_model


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.fix for check in report.checks if not check.ok}


def test_an_empty_store_lacks_the_default_model(home: Path) -> None:
    report = examine(Store(home))
    assert not report.healthy
    assert failed(report) == {f"model {DEFAULT_MODEL}": f"deskside pull {DEFAULT_MODEL}"}
    assert report.models == ()
    assert not home.exists()


def test_a_store_with_the_default_model_is_healthy(home: Path, install: Install) -> None:
    install(DEFAULT_MODEL)
    report = examine(Store(home))
    assert report.healthy
    assert report.models == ({"name": DEFAULT_MODEL, "quantization": "Q8_0", "size_bytes": 7, "panel_bytes": 0},)


def test_facts_are_of_this_machine(home: Path) -> None:
    report = examine(Store(home))
    assert 1 <= report.machine.physical_cores <= report.machine.logical_cores
    assert report.disk_free_bytes > 0
    assert report.deskside.startswith("0.")
    assert report.python.startswith("3.")


def test_a_damaged_model_is_named_with_its_fix(home: Path, install: Install) -> None:
    install("broken")
    (home / "models" / "broken" / MANIFEST_FILE).write_text("nonsense")
    assert "deskside models remove broken" in failed(examine(Store(home)))["model broken"]


@pytest.mark.parametrize(("backend", "reported"), [("CPU (AVX2, AMX unused)", True), ("CPU (AVX2, AMX_INT8)", False)])
def test_unused_amx_is_reported_with_the_fix(
    home: Path, monkeypatch: pytest.MonkeyPatch, backend: str, reported: bool
) -> None:
    monkeypatch.setattr(doctor, "llama_cpp_state", lambda: (backend, False, ""))
    [check] = [check for check in examine(Store(home)).checks if check.name == "llama.cpp"]
    assert check.ok
    assert ("make rebuild" in check.detail) is reported


def test_a_llama_cpp_that_cannot_be_loaded_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "llama_cpp_state", lambda: ("unknown", False, "no such library"))
    report = examine(Store(home))
    assert "llama.cpp" in failed(report)


def test_the_installed_llama_cpp_can_be_asked() -> None:
    backend, _, trouble = doctor.llama_cpp_state()
    assert "CPU" in backend
    assert trouble == ""


def test_a_small_disk_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_NEEDED_BYTES", 1 << 62)
    assert "DESKSIDE_HOME" in failed(examine(Store(home)))["store"]


def test_the_report_for_people_holds_every_check_and_fix(home: Path) -> None:
    out = io.StringIO()
    print_report(examine(Store(home)), Console(file=out, soft_wrap=True))
    text = out.getvalue()
    assert f"fix: deskside pull {DEFAULT_MODEL}" in text
    assert "CPU (AVX2)" in text
    assert str(home) in text


@pytest.mark.parametrize("installed", [True, False])
def test_the_command(home: Path, install: Install, capsys: pytest.CaptureFixture[str], installed: bool) -> None:
    if installed:
        install(DEFAULT_MODEL)
    with pytest.raises(SystemExit) as leaving:
        main(["doctor", "--json"])
    assert leaving.value.code == (0 if installed else 1)
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is installed
    assert {check["name"] for check in report["checks"]} >= {"python", "llama.cpp", "store", f"model {DEFAULT_MODEL}"}


def test_sizes_have_readable_units() -> None:
    assert [human_bytes(n) for n in (None, 7, 2048, 5 << 20, 3 << 29)] == [
        "unknown",
        "7 B",
        "2 KiB",
        "5 MiB",
        "1.5 GiB",
    ]
