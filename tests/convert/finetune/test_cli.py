"""`deskside finetune`: what is missing is said with the command that mends it; the result with the next command."""

import importlib.util
from pathlib import Path

import pytest

from convert.errors import FinetuneFailed
from convert.finetune.cli import summary
from convert.finetune.settings import EpochScore, FinetuneRequest, FinetuneResult, FinetuneSettings, TrainingCost
from convert.finetune.train import check_installed
from runtime.cli.main import load_verb, main
from tests.support.convert.tiny import write_mails

COST = TrainingCost(2, 3, 60.0, 1 << 20)


@pytest.fixture
def with_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if JAX was installed: these requests are refused before it is used."""
    monkeypatch.setattr("convert.finetune.train.check_installed", lambda: None)


def test_without_jax_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FinetuneFailed, match=r"JAX, which is not installed; .*pip install -e '\.\[finetune\]'"):
        check_installed()


def test_the_options_are_those_of_the_settings() -> None:
    options = {option for one in load_verb("finetune").params for option in one.opts}
    expected = {"--base", "--validation", "--name", "--out", "--minutes", "--method", "--layers", "--epochs", "--seed"}
    assert expected <= options


@pytest.mark.usefixtures("with_jax")
def test_what_is_missing_or_unknown_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path / "home"))
    mails, table = str(write_mails(tmp_path / "mails.jsonl")), tmp_path / "mails.csv"
    table.write_text("text,label\nhello,ham\n")
    refused = {
        (mails,): (2, "--name NAME or --out DIR is missing"),
        (mails, "--name", "mails", "--base", "gemma-3-271m"): (1, "gemma-3-271m"),
        (str(table), "--name", "mails"): (1, str(table)),
        (mails, "--name", "mails", "--layers", "0"): (2, "--layers"),
    }
    for arguments, (code, said) in refused.items():
        with pytest.raises(SystemExit) as leaving:
            main(["finetune", *arguments])
        assert leaving.value.code == code
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("accuracy", [0.875, None])
def test_the_next_command_is_said(accuracy: float | None, tmp_path: Path) -> None:
    best = EpochScore(2, 0.1, 0.3, accuracy, kept=True)
    result = FinetuneResult(tmp_path, best, (best, best), COST, 90.0, 160.0)
    request = FinetuneRequest(train=Path("t.jsonl"), validation=Path("v.jsonl"), name="mails")
    lines = summary(result, request, "gemma-3-270m")
    assert lines[0].startswith("trained in 1.5 minutes, epoch 2 of 2: on the validation examples ")
    assert ("accuracy 0.875, loss 0.300" in lines[0]) == (accuracy is not None)
    assert lines[1] == (f"next: deskside convert gemma-3-270m --adapter {tmp_path} --name mails --examples v.jsonl")


def test_a_score_is_better_by_accuracy_first() -> None:
    def score(accuracy: float | None, loss: float) -> EpochScore:
        return EpochScore(1, 0.0, loss, accuracy, kept=False)

    assert score(0.8, 1.0).is_better_than(None)
    assert score(0.81, 2.0).is_better_than(score(0.8, 1.0))
    assert score(0.8, 0.9).is_better_than(score(0.8, 1.0))
    assert not score(0.8, 1.0).is_better_than(score(0.8, 1.0))
    assert score(None, 0.9).is_better_than(score(None, 1.0))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        FinetuneSettings(layers=0)
