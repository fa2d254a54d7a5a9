"""`deskside task …`: data on stdout, progress on stderr. `runtime.cli.main` reports errors."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

# That of `common.options` loads pydantic.
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Task = Annotated[str, typer.Argument(help="A task's name, or its folder.", metavar="TASK")]
_File = Annotated[Path, typer.Argument(help="CSV, TSV, JSON lines, chat records, Parquet or XLSX.", metavar="FILE")]

if TYPE_CHECKING:
    from models.task.check.finding import CheckReport
    from models.task.check.texts import CountTokens, TokensOf
    from models.task.task import Task


def create_app(tokens_of: "TokensOf | None" = None) -> typer.Typer:
    """The verbs of `deskside task`. `tokens_of` finds the tokenizer of an installed model, by which `check` counts."""
    app = typer.Typer(
        name="task",
        help="Make a task of your own texts, check it, mend it.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"obj": tokens_of},
    )
    app.command("new")(new_command)
    app.command("list")(list_command)
    app.command("show")(show_command)
    app.command("check")(check_command)
    app.command("review")(review_command)
    app.command("apply")(apply_command)
    return app


def new_command(
    name: Annotated[str, typer.Argument(help="Name of the task.", metavar="NAME")],
    file: _File,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="COLUMN", help="The text; several are joined. Default: guessed."),
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="COLUMN", help="The answer. Default: guessed.")] = None,
    kind: Annotated[
        Literal["classify", "extract", "write"] | None, typer.Option(help="Default: guessed from the answers.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="The user's message, with {input} in the place of the text.")
    ] = "{input}",
    sheet: Annotated[
        str | None, typer.Option(metavar="NAME", help="Sheet of a workbook. Default: the first with rows.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(metavar="NAME", help="Such as utf-8 or windows-1252. Default: guessed.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(metavar="CHARACTER", help="One character, or tab. Default: guessed.")
    ] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="The first row names the columns. Default: guessed.")
    ] = None,
    licence: Annotated[
        str, typer.Option(metavar="TEXT", help="Licence of the texts, for the card.", show_default=False)
    ] = "",
    seed: Annotated[int, typer.Option(metavar="INTEGER", help="Another seed, another split.")] = 0,
) -> None:
    """Make a task of a file: columns and kind are guessed unless given, and the rows split by content.

    The file is only read. Texts that are equal, or nearly, never end in two splits.
    """
    from models.common.console import page
    from models.task.new import NewTask, make_task
    from models.task.readers.table import ReadOptions

    reading = ReadOptions(encoding=encoding, separator=separator, header=header, sheet=sheet)
    made = make_task(
        NewTask(
            name=name,
            file=file.expanduser(),
            inputs=tuple(inputs or ()),
            output=output,
            kind=kind,
            prompt=prompt,
            licence=licence,
            seed=seed,
            reading=reading,
        )
    )
    from rich.table import Table as Grid

    table = Grid(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for row in made.found:
        table.add_row(*row)
    if made.task.spec.labels:
        table.add_row("labels", _labels(made.task.spec.labels), "")
    table.add_row("rows", ", ".join(f"{n:,} {split}" for split, n in made.sizes.items()), f"seed {seed}; --seed")
    table.add_row("folder", str(made.task.folder), "")
    page().print(table)
    typer.echo(f"next: deskside task check {made.task.address}", err=True)


def list_command(as_json: _AsJson = False) -> None:
    """List the tasks in Deskside's folder."""
    from models.errors import ModelError
    from models.task.task import open_task, task_names, tasks_home

    listed: list[dict[str, Any]] = []
    for name in task_names():
        try:
            task = open_task(name)
            listed.append({"name": name, "kind": task.spec.kind, "sizes": _sizes(task), "folder": str(task.folder)})
        except ModelError as error:
            listed.append(
                {"name": name, "kind": "damaged", "sizes": {}, "folder": str(tasks_home() / name), "error": str(error)}
            )
    if as_json:
        _print_json(listed)
        return
    if not listed:
        typer.echo("there is no task; make one: deskside task new NAME FILE", err=True)
    for row in listed:
        sizes = ", ".join(f"{n:,} {split}" for split, n in row["sizes"].items()) or row.get("error", "")
        typer.echo(f"{row['name']}  {row['kind']}  {sizes}")


def show_command(name: _Task, as_json: _AsJson = False) -> None:
    """Show a task: kind, prompt, labels or schema, sizes, origin, and an example."""
    import json

    from models.task.check.finding import shown
    from models.task.task import open_task, text_of

    task = open_task(name)
    sizes, spec = _sizes(task), task.spec
    if as_json:
        fields = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        _print_json({"name": task.name, "folder": str(task.folder), "sizes": sizes} | fields)
        return
    read = f"the first {spec.max_text_tokens} tokens of a text" if spec.max_text_tokens is not None else ""
    lines = {
        "kind": f"{spec.kind}, scored by {spec.scorer}",
        "prompt": spec.prompt,
        "system": spec.system,
        "reads": read,
    }
    lines["labels"] = _labels(spec.labels)
    lines["schema"] = json.dumps(spec.json_schema, ensure_ascii=False) if spec.json_schema else ""
    lines["rows"] = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    lines |= {"source": spec.source, "licence": spec.licence, "folder": str(task.folder)}
    typer.echo(f"{task.name}\n")
    for what, value in lines.items():
        if value:
            typer.echo(f"{what:8} {value}")
    example = task.records("train")[0]
    typer.echo(f"\n{shown(text_of(example), 200)}\n→ {shown(example.answer, 200)}")


def check_command(
    context: typer.Context,
    name: _Task,
    as_json: _AsJson = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Count in this model's tokens. Default: the default base, if installed."),
    ] = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Also write the review page of suspicious labels.")
    ] = None,
) -> None:
    """Check a task in seconds: duplicates, leakage, labels, personal data, style, probably wrong labels.

    Exit code 3 if something must be mended before any figure of the task is true.
    """
    from models.errors import DONE, SOME_FAILED
    from models.task.task import open_task

    task, tokens_of = open_task(name), context.obj
    if base is not None and tokens_of is None:
        raise typer.BadParameter("no model's tokenizer can be read here", param_hint="--base")
    report = _checked(task, tokens_of(base) if tokens_of is not None else None)
    if as_json:
        _print_json(report.model_dump(mode="json"))
    else:
        from models.task.check.terminal import print_report

        print_report(report)
    if page_file is not None:
        _write_page(task, report, page_file.expanduser())
    raise typer.Exit(SOME_FAILED if report.must_mend else DONE)


def review_command(
    name: _Task,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page. Default: review.html in the task's folder.")
    ] = None,
) -> None:
    """Write a page to look through suspicious labels: keep, relabel or drop, by key. It works without a network."""
    from models.errors import BadTask
    from models.task.review.page import PAGE_FILE
    from models.task.task import open_task

    task = open_task(name)
    if task.spec.kind != "classify":
        raise BadTask(f"{task.name!r} is of kind {task.spec.kind!r}; only labels (kind 'classify') can be reviewed")
    _write_page(task, _checked(task), out.expanduser() if out is not None else task.folder / PAGE_FILE)


def apply_command(
    name: _Task,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="Decisions of the review page. Default: decisions.json in the task's folder."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", metavar="FINDING", help="Drop what a finding of `check` names.")
    ] = None,
    relabel: Annotated[
        list[str] | None, typer.Option("--relabel", metavar="OLD=NEW", help="Give all examples of a label another one.")
    ] = None,
    undo_last: Annotated[bool, typer.Option("--undo", help="Bring back the examples as they were before.")] = False,
) -> None:
    """Apply decisions to a task's examples. What they were is kept in its `history`, and `--undo` brings it back."""
    from models.errors import BadTask
    from models.task.check.check import dropped_by
    from models.task.review.decisions import DECISIONS_FILE, apply_decisions, decision, read_decisions, relabelled, undo
    from models.task.task import open_task, rows

    task = open_task(name)
    if undo_last:
        if file is not None or drop or relabel:
            raise typer.BadParameter("--undo goes alone")
        typer.echo(f"{task.name}: undone; what was applied is in {str(undo(task))!r}", err=True)
        return
    if drop or relabel:
        if file is not None or (drop and relabel):
            raise typer.BadParameter("give one of FILE, --drop and --relabel; several runs apply several")
        if relabel and (bad := next((one for one in relabel if not all(one.partition("="))), None)):
            raise typer.BadParameter(f"--relabel takes OLD=NEW, got {bad!r}")
        renames = [(one.partition("=")[0], one.partition("=")[2].strip()) for one in relabel or ()]
        dropped = {(key.split, key.id) for key in dropped_by(task, drop)} if drop else set()
        if drop and not dropped:
            raise BadTask(f"check finds nothing to drop under {', '.join(map(repr, drop))} in {task.name!r}")
        decisions = [
            *relabelled(task, renames),
            *(decision(split, one, "drop") for split, one in rows(task) if (split, one.id) in dropped),
        ]
    else:
        read = read_decisions(file.expanduser() if file is not None else task.folder / DECISIONS_FILE)
        if read.task != task.name:
            raise BadTask(f"the decisions are about the task {read.task!r}, not {task.name!r}")
        decisions = list(read.decisions)
    done = apply_decisions(task, decisions)
    typer.echo(f"{task.name}: {done.n_relabelled} relabelled, {done.n_dropped} dropped, {done.n_kept} kept")
    if done.entry is not None:
        typer.echo(f"as it was: {str(done.entry)!r}; back: deskside task apply {task.address} --undo", err=True)


def _checked(task: "Task", count_tokens: "CountTokens | None" = None) -> "CheckReport":
    # Before numpy is loaded: its products are small here, and beside another busy program two threads that wait for
    # each other take three times as long as one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from models.common.console import ProgressBars
    from models.task.check.check import check_task

    with ProgressBars(transient=True) as bars:
        return check_task(task, count_tokens, lambda done, total: bars.update("judging the labels", done, total))


def _write_page(task: "Task", report: "CheckReport", path: Path) -> None:
    from models.task.review.page import write_page

    n_rows = write_page(task, report.suspicious, path)
    typer.echo(f"{path}: {n_rows} examples to look at; open it in a browser", err=True)


def _sizes(task: "Task") -> dict[str, int]:
    return {split: len(records) for split, records in task.all_records().items()}


def _labels(labels: tuple[str, ...]) -> str:
    more = f" … ({len(labels)})" if len(labels) > 20 else ""
    return ", ".join(labels[:20]) + more


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
