"""Who wins a race computes prompts; the decision holds for one file as it is, on one machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.prefill.prompts import BUDGET_S, MAX_ROUNDS, Decisions, Race, race


def runner(stock: float, own: float) -> tuple[list[bool], Callable[[bool], float]]:
    calls: list[bool] = []

    def seconds(is_own: bool) -> float:
        calls.append(is_own)
        return own if is_own else stock

    return calls, seconds


def test_a_round_goes_before_and_turns_alternate() -> None:
    calls, seconds = runner(BUDGET_S, BUDGET_S / 2)
    assert race(seconds) == Race(1e3 * BUDGET_S, 500 * BUDGET_S)
    assert calls == [True, False, False, True]


def test_fast_prompts_are_timed_often_but_not_for_ever() -> None:
    calls, seconds = runner(1e-6, 1e-6)
    race(seconds)
    assert len(calls) == 2 * (MAX_ROUNDS + 1)


@pytest.mark.parametrize(("stock", "own", "wins"), [(2.0, 1.0, True), (1.02, 1.0, False), (1.0, 2.0, False)])
def test_a_narrow_win_is_none(stock: float, own: float, wins: bool) -> None:
    assert Race(stock, own).own_wins is wins


def test_a_decision_is_kept_for_the_file_and_the_machine(tmp_path: Path) -> None:
    model, folder = tmp_path / "model.gguf", tmp_path / "cache"
    model.write_text("weights")
    kept = Decisions(folder, "a processor", 2)
    assert kept.find(model) is None
    kept.keep(model, Race(20.0, 10.0))
    assert Decisions(folder, "a processor", 2).find(model) == Race(20.0, 10.0)
    assert Decisions(folder, "a processor", 4).find(model) is None
    model.write_text("other weights")
    assert kept.find(model) is None


@pytest.mark.parametrize("content", ["", "[]", '{"stock_ms": "x", "own_ms": 1}', "{}"])
def test_a_damaged_decision_counts_as_none(tmp_path: Path, content: str) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    kept = Decisions(tmp_path / "cache")
    kept.keep(model, Race(2.0, 1.0))
    next((tmp_path / "cache").iterdir()).write_text(content)
    assert kept.find(model) is None
