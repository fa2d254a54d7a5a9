"""`deskside convert` through the front door: data on stdout, stages on stderr, exit codes."""

import json
from pathlib import Path

import pytest

from convert.cli import build_recipe
from convert.quantize.quantize import DEFAULT_QUANTIZATION, QUANTIZATIONS
from models.common.console import BarReporter, LineReporter, reporter
from models.store.catalog import load_catalog
from models.store.store import Store
from runtime.cli.main import main
from tests.support.convert.tiny import write_adapter, write_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    write_adapter(tmp_path / "adapter")
    return write_model(tmp_path / "base.gguf")


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        main(["convert", *map(str, arguments)])
    return left.value.code


def test_json_names_the_model_and_its_manifest(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--adapter", model.parent / "adapter", "--name", "tiny", "--quant", "f16", "--keep-f16", "--json")
    assert run(model, *options) in {0, None}
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["name"] == "tiny"
    assert Path(answer["gguf"]).is_file()
    assert [artefact["quantization"] for artefact in answer["manifest"]["artefacts"]] == ["F16"]
    assert printed.err.splitlines() == ["check base.gguf …", "merge 14 tensors, write F16 …", "verify …"]


def test_a_person_gets_the_name_and_the_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--name", "tiny", "--quant", "F16") in {0, None}
    printed = capsys.readouterr()
    assert printed.out == f"tiny\t{model.parent}/home/models/tiny/tiny-F16.gguf\n"
    *_, then = lines = printed.err.splitlines()
    assert then == "next: deskside serve tiny"
    assert "installed tiny: F16, 0 MiB" in lines
    unknown = " ".join(printed.err.split())
    assert "its task is not known: /v1/decisions asks it in the words of each question" in unknown


def test_a_hot_adapter_is_made(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--adapter", model.parent / "adapter", "--hot", "--name", "mine", "--json") in {0, None}
    printed = capsys.readouterr()
    assert json.loads(printed.out)["manifest"]["kind"] == "adapter"
    assert printed.err.splitlines() == ["check base.gguf …", "write 14 pairs of matrices …", "verify …"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "--name is missing"),
        (("--name", "x", "--quant", "Q9"), 2, "unknown quantization 'Q9'"),
        (("--name", "x", "--hot"), 2, "--hot needs --adapter DIR"),
        (("--name", "x", "--hot", "--adapter", "a", "--quant", "Q8_0"), 2, "leave out --quant"),
        (("--name", "x", "--adapter", "no/such"), 1, "'no/such' is not a PEFT adapter folder"),
    ],
)
def test_faults_are_one_line_and_an_exit_code(
    model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, message: str
) -> None:
    assert run(model, *options) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]


def test_an_installed_model_of_a_recipes_name_stays_and_is_told_apart(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, "--name", "email-triage", "--quant", "F16")
    capsys.readouterr()
    stored = build_recipe(load_catalog().get("email-triage"), Store())
    assert stored.gguf.name == "email-triage-F16.gguf"
    assert "warning: 'email-triage' is installed, but from another adapter or base" in capsys.readouterr().err


def test_the_reporter_suits_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(reporter(), LineReporter)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bars = reporter()
    assert isinstance(bars, BarReporter)
    bars.close()


def test_bars_show_stages_and_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    bars = BarReporter()
    bars.stage("merge", 10)
    bars.advance(5, 10, "loss 0.25")
    bars.warn("the [base] is odd")
    bars.stage("quantize")
    bars.advance(3, 7)
    bars.close()
    bars.close()
    shown = capsys.readouterr().err
    assert "warning: the [base] is odd" in shown
    assert "merge: loss 0.25" in shown
    assert "quantize" in shown


def test_the_help_names_every_quantization(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("--help") in {0, None}
    shown = capsys.readouterr().out
    assert all(name in shown for name in QUANTIZATIONS)
    assert f"[default: ({DEFAULT_QUANTIZATION})]" in shown
