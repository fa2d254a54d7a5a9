"""Figures of hand-made samples, worked out by hand; what is shown about them; what the run says against itself."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.comparison.figures import derive, summarise, tpot_ms, warnings
from benchmarks.cost import Assumptions
from benchmarks.record import BenchRun, RequestSample, load_run, save_run
from benchmarks.report.terminal import LATENCY_COLUMNS, RATE_COLUMNS, render, speed_tables
from tests.support.benchmarks.examples import arm, run_of, sample


def shown(run: BenchRun, assumptions: Assumptions | None = None) -> str:
    derived, statistics, bill = derive(run, assumptions or Assumptions())
    console = Console(width=250, record=True, file=io.StringIO())
    render(derived, statistics, bill, console)
    return console.export_text()


def steady(n: int, **fields: object) -> list[RequestSample]:
    return [sample(i, start=float(i), **fields) for i in range(n)]  # type: ignore[arg-type]


def test_a_level_by_hand() -> None:
    failed = sample(64, start=64.0, text="", error="HTTP 500", finish=1.0)
    figures = summarise(run_of(arm(levels={4: [*steady(64), failed]}))).arms[0].levels[0]
    assert (figures.requests, figures.errors) == (65, 1)
    assert figures.wall_s == pytest.approx(65.0)
    assert figures.requests_per_s == pytest.approx(64 / 65)
    assert figures.completion_tokens_per_s == pytest.approx(3 * 64 / 65)
    assert figures.cached_share == pytest.approx(0.5)
    assert figures.ttft is not None
    assert figures.ttft.p50_ms == pytest.approx(100)
    assert figures.e2e.p90_ms == pytest.approx(300)
    assert figures.tpot is not None
    assert figures.tpot.p50_ms == pytest.approx(100)  # (300 - 100) / (3 - 1)


def test_tpot_needs_two_tokens() -> None:
    assert tpot_ms(sample().model_copy(update={"completion_tokens": 1})) is None
    assert tpot_ms(sample().model_copy(update={"deltas_s": ()})) is None


def test_a_failed_request_counts_as_wrong() -> None:
    samples = [sample(0), sample(1, text="ham"), sample(2, error="HTTP 500")]
    accuracy = summarise(run_of(arm(levels={1: samples}))).arms[0].accuracy
    assert accuracy is not None
    assert (accuracy.correct, accuracy.total) == (1, 3)


def test_arms_are_compared_on_the_same_mails() -> None:
    first = arm("fine-tune", {1: [sample(0), sample(1)]})
    second = arm("base-few-shot", {1: [sample(0, text="ham"), sample(1)]})
    (pair,) = summarise(run_of(first, second)).comparisons
    assert (pair.first, pair.second, pair.only_first, pair.both) == ("fine-tune", "base-few-shot", 1, 1)


def replayed() -> BenchRun:
    hosted = arm("hosted (replayed)", {1: steady(64)}, kind="replayed", streams=False, measures_accuracy=False)
    base = arm("base-few-shot", {1: steady(64)}, shared_share=0.9)
    return run_of(arm("fine-tune", {1: steady(64)}), base, hosted)


def test_what_is_replayed_says_so_and_claims_no_more() -> None:
    run = replayed()
    text = shown(run)
    rows = [line for line in text.splitlines() if line.startswith("hosted")]
    assert rows
    assert all("replayed" in row for row in rows)
    assert "accuracy, hosted (replayed): not measured" in text
    figures = summarise(run).arms[2]
    assert figures.accuracy is None
    assert figures.levels[0].ttft is None
    assert figures.levels[0].tpot is None


def test_the_bill_uses_the_counted_prompt_and_the_best_rate() -> None:
    _, statistics, bill = derive(replayed(), Assumptions())
    assert bill is not None
    assert bill.tokens.prompt == pytest.approx(1000)
    assert bill.tokens.shared == pytest.approx(900)
    assert bill.local_seconds_per_request == pytest.approx(1 / statistics.arms[0].levels[0].requests_per_s)
    assert "assumed" in shown(replayed())


def test_the_report_says_when_the_prompt_wins() -> None:
    dear = Assumptions(finetune_price=1e6, monthly_requests=100)
    assert "on cost alone, take the prompt" in shown(replayed(), dear)
    cheap = Assumptions(finetune_price=0, finetune_hours=0)
    assert "on cost alone, take the prompt" not in shown(replayed(), cheap)
    assert "never" in shown(replayed(), Assumptions(power_watts=1e9))


def test_every_cell_of_the_speed_tables_has_a_header() -> None:
    run = replayed()
    latency, rates = speed_tables(summarise(run))
    assert [str(column.header) for column in latency.columns] == ["arm", *LATENCY_COLUMNS]
    assert [str(column.header) for column in rates.columns] == ["arm", *RATE_COLUMNS]
    cells = {str(column.header): list(column.cells) for table in (rates, latency) for column in table.columns}
    assert cells["arm"] == ["fine-tune", "base-few-shot", "hosted (replayed)"]
    assert cells["users"] == ["1", "1", "1"]
    assert cells["E2E p50"][0] == "300 [300, 300]"
    assert cells["tok/s out"][0] == "3.0"


def test_few_requests_show_no_p90() -> None:
    text = shown(run_of(arm(levels={1: steady(10)})))
    assert "n<64" in text


def test_a_run_is_shown_the_same_from_its_file(tmp_path: Path) -> None:
    derived, _, _ = derive(replayed(), Assumptions())
    save_run(tmp_path / "run.json", derived)
    assert shown(load_run(tmp_path / "run.json")) == shown(derived)


def test_a_run_warns_about_itself() -> None:
    busy = arm(levels={1: [sample(0), sample(1, error="HTTP 500")]})
    busy = busy.model_copy(update={"levels": (busy.levels[0].model_copy(update={"load_before": 3.0}),)})
    found = "\n".join(warnings(run_of(busy)))
    assert "1 of 2 requests failed" in found
    assert "HTTP 500" in found
    assert "too few for a p90" in found
    assert "busy" in found


def test_a_reused_prompt_is_noticed() -> None:
    seen = [sample(i, prompt=100).model_copy(update={"cached_tokens": 99}) for i in range(64)]
    assert any("before?" in warning for warning in warnings(run_of(arm(levels={1: seen}))))
    assert warnings(run_of(arm(levels={1: steady(64)}))) == ()


@pytest.mark.parametrize(
    ("prompt", "cached", "reused"),
    [
        pytest.param(lambda n: 40 + n % 9, lambda n: 39 + n % 9, True, id="asked again"),
        pytest.param(lambda n: 12 + n % 5, lambda n: 7 + n % 2, False, id="short texts in a template"),
        pytest.param(lambda n: 60, lambda n: 50, False, id="short texts after a long system message"),
        pytest.param(lambda n: 200 + n, lambda n: 4 if n % 4 == 0 else 150, True, id="most asked again, in part"),
    ],
)
def test_only_what_was_asked_before_is_taken_for_it(
    prompt: Callable[[int], int], cached: Callable[[int], int], *, reused: bool
) -> None:
    seen = [sample(n, prompt=prompt(n)).model_copy(update={"cached_tokens": cached(n)}) for n in range(64)]
    assert any("before?" in line for line in warnings(run_of(arm(levels={1: seen})))) == reused
