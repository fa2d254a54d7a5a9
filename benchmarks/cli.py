"""The verbs `deskside bench`, `deskside eval` and `deskside compare`: data on stdout, progress on stderr."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.comparison.evaluate import evaluate, score_of
from benchmarks.comparison.figures import derive
from benchmarks.comparison.plan import EvalSettings, evaluation_task
from benchmarks.comparison.run import BenchSettings, make_plan, run
from benchmarks.conversion.compare import convert_speed_command
from benchmarks.conversion.trim import trim_command
from benchmarks.load.servers import recipe_file
from benchmarks.peers.report import peers_command
from benchmarks.prefill.race import prefill_command
from benchmarks.report.plots import latency_picture
from benchmarks.report.terminal import render, render_score
from benchmarks.report.ways import render_ways, ways_markdown
from benchmarks.soak.prefixes import prefixes_command
from benchmarks.soak.soak import soak_command
from benchmarks.ways.plan import CompareSettings, compare_plan
from benchmarks.ways.run import compare_ways, judgement_of
from models.common.console import page, show_progress
from models.common.files import write_atomic
from models.common.options import JsonOption, with_options
from models.errors import SOME_FAILED
from models.store.store import Store
from models.task.task import open_task

from .cost import Assumptions, check
from .record import BenchRun, load_run, save_run

_Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="PATH", help="Also draw the latency distributions to this PNG.")
]


def create_app() -> typer.Typer:
    """The verb `deskside bench` and its subcommands."""
    app = typer.Typer(name="bench", help="Measure speed and cost against a hosted prompt.", add_completion=False)
    app.callback(invoke_without_command=True)(bench_command)
    app.command("report")(report_command)
    app.command("peers")(peers_command)
    app.command("soak")(soak_command)
    app.command("convert")(convert_speed_command)
    app.command("trim")(trim_command)
    app.command("prefill")(prefill_command)
    app.command("prefixes")(prefixes_command)
    return app


@with_options(settings=BenchSettings, assumptions=Assumptions)
def bench_command(
    context: typer.Context,
    settings: BenchSettings,
    assumptions: Assumptions,
    as_json: JsonOption = False,
    plot: _Plot = None,
) -> None:
    """Measure the local fine-tune, the local base with a few-shot prompt, and a hosted prompt (or its replay)."""
    if context.invoked_subcommand is not None:
        return
    check(assumptions)
    plan = make_plan(settings, Store())
    with show_progress() as progress:
        finished = run(plan, progress)
    _show(finished, assumptions, as_json=as_json, plot=plot, save_to=plan.out)
    print(f"raw samples and statistics: {plan.out}", file=sys.stderr)
    if any(sample.error for arm in finished.arms for level in arm.levels for sample in level.samples):
        raise typer.Exit(SOME_FAILED)


@with_options(assumptions=Assumptions)
def report_command(
    file: Annotated[Path, typer.Argument(help="A file that `deskside bench` wrote.", metavar="FILE")],
    assumptions: Assumptions,
    as_json: JsonOption = False,
    plot: _Plot = None,
) -> None:
    """Show a run again from its raw samples; given assumptions replace those of the run."""
    earlier = load_run(file)
    stored = Assumptions.model_validate(earlier.cost["assumptions"]) if earlier.cost else Assumptions()
    given = assumptions.model_dump(include=assumptions.model_fields_set)
    _show(earlier, stored.model_copy(update=given), as_json=as_json, plot=plot, save_to=None)


@with_options(settings=EvalSettings)
def eval_command(
    model: Annotated[str, typer.Argument(help="A model of the store, or a path.", metavar="MODEL")],
    settings: EvalSettings,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on a task's examples and keep each answer, scored by the kind of the task.

    Labels: accuracy and macro-F1. JSON: validity against the schema and F1 of the fields; answers are requested with
    response_format. Texts: ROUGE-L. --shots measures a base model that was not trained on the task. With --url and a
    name that is not installed here, a model of any OpenAI-compatible API is measured.
    """
    task = evaluation_task(model, settings, Store())
    with show_progress() as progress:
        evaluation = evaluate(task, progress)
    score = score_of(evaluation, task.asked)
    if n_cut := sum(item.cut for item in evaluation.predictions):
        limit = evaluation.source.max_tokens if evaluation.source is not None else None
        print(f"warning: {n_cut} answers were cut at {limit} tokens; --max-tokens allows more", file=sys.stderr)
    if as_json:
        shown = evaluation.model_dump(mode="json", exclude_defaults=True)
        predictions, source = shown["predictions"], shown.get("source", {})
        print(json.dumps({**asdict(score), "source": source, "predictions": predictions}, ensure_ascii=False, indent=2))
    else:
        render_score(f"{model} ({task.asked.name})" if task.asked is not None else model, score)


@with_options(settings=CompareSettings)
def compare_command(
    settings: CompareSettings,
    task: Annotated[
        str | None, typer.Argument(help="A task's name, or its folder. Default: email-triage's.", metavar="TASK")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the report for a pull request.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every way to solve a task on its test split, and say which differences are real.

    Without a model: the commonest answer, a word model, the nearest examples and their vote. With one, asked over HTTP:
    the base with no, the same or the most similar examples in its prompt, the fine-tune, the fine-tune with the vote,
    a hosted API or its recorded answers. Every answer is kept; a killed run continues with the same --out.
    """
    plan = compare_plan(open_task(task or str(recipe_file())), settings, Store())
    print(f"answers are kept in {plan.out}; --out {plan.out} continues a run that was stopped", file=sys.stderr)
    with show_progress() as progress:
        comparison = compare_ways(plan, progress, ["deskside", *sys.argv[1:]])
    judgement = judgement_of(comparison, plan)
    if markdown is not None:
        write_atomic(markdown, ways_markdown(comparison, judgement))
    if as_json:
        shown = comparison.model_dump(mode="json", exclude={"unused": True, "ways": {"__all__": {"answers"}}})
        print(json.dumps(shown, ensure_ascii=False, indent=2))
    else:
        render_ways(comparison, judgement, page())
    if judgement is None or any(way.stopped for way in comparison.ways):
        raise typer.Exit(SOME_FAILED)


def _show(
    recorded: BenchRun, assumptions: Assumptions, *, as_json: bool, plot: Path | None, save_to: Path | None
) -> None:
    check(assumptions)
    derived, statistics, bill = derive(recorded, assumptions)
    if save_to is not None:
        save_run(save_to, derived)
    if plot is not None:
        latency_picture(derived, plot)
    if as_json:
        print(json.dumps(derived.model_dump(mode="json", exclude={"arms"}), ensure_ascii=False, indent=2))
        return
    render(derived, statistics, bill, page())
