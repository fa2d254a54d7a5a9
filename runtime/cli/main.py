"""The command `deskside`: composes the verbs of all houses, and turns each error into one line and an exit code.

A verb's module is imported when the verb is called, so that `deskside --help` and the small verbs answer at once.
Exit codes: 0 done, 1 failed, 2 usage, 3 finished with some items failed, 130 interrupted.
"""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from benchmarks.errors import BenchError
from convert.errors import ConvertError, RequestInvalid
from models.errors import FAILED, INTERRUPTED, USAGE, ModelError, nearest
from runtime.errors import BatchRefused, EngineError, RequestError


@dataclass(frozen=True, slots=True)
class Verb:
    """Location of a verb: `factory` of `module` makes a typer app (`create_app`) or is the command function itself."""

    module: str
    factory: str
    help: str


VERBS: Mapping[str, Verb] = {
    "models": Verb("models.cli", "create_app", "List, show, verify and remove installed models."),
    "pull": Verb("runtime.cli.main", "pull_command", "Install a model of the catalogue, or any GGUF on the Hub."),
    "task": Verb("runtime.cli.task", "create_app", "Make a task of your own texts, check it, mend it."),
    "convert": Verb("convert.cli", "convert_command", "Make a model: checkpoint + LoRA adapter to quantized GGUF."),
    "finetune": Verb("convert.cli", "finetune_command", "Train and install a model of your own examples."),
    "rollback": Verb("models.cli", "rollback_command", "Bring back the model that was replaced last."),
    "eval": Verb("benchmarks.cli", "eval_command", "Measure a model's accuracy on labelled examples."),
    "compare": Verb("benchmarks.cli", "compare_command", "Measure every way to solve a task, side by side."),
    "serve": Verb("runtime.cli.commands", "serve_command", "Serve models to any OpenAI client."),
    "batch": Verb("runtime.cli.commands", "batch_command", "Answer a file of requests; resumable, nothing lost."),
    "chat": Verb("runtime.cli.commands", "chat_command", "Talk to a model in the terminal."),
    "bench": Verb("benchmarks.cli", "create_app", "Measure speed and cost, compared with a hosted prompt."),
    "cache": Verb("runtime.cli.cache", "create_app", "List and clear the prefixes that servers keep on disk."),
    "doctor": Verb("runtime.cli.commands", "doctor_command", "Show what this machine has and what is missing."),
}

# Error type -> exit code; the first matching row decides. Any other error is a bug.
EXIT_CODES: Mapping[type[BaseException], int] = {
    RequestInvalid: USAGE,
    ConvertError: FAILED,
    BenchError: FAILED,
    ModelError: FAILED,
    RequestError: FAILED,
    EngineError: FAILED,
    BatchRefused: FAILED,
    OSError: FAILED,
    KeyboardInterrupt: INTERRUPTED,
}


# What other programs call our verbs, or what we do not do -> what to type.
MEANT: Mapping[str, str] = {
    **dict.fromkeys(
        ("run", "start", "up"), "deskside serve MODEL (a server), or deskside chat MODEL (in the terminal)"
    ),
    **dict.fromkeys(("list", "ls", "ps"), "deskside models list"),
    **dict.fromkeys(("rm", "remove", "delete"), "deskside models remove NAME"),
    **dict.fromkeys(("show", "info"), "deskside models show NAME"),
    **dict.fromkeys(("download", "install", "get", "add"), "deskside pull NAME"),
    **dict.fromkeys(("quantize", "merge", "import", "create"), "deskside convert SOURCE --name NAME"),
    **dict.fromkeys(("evaluate", "test", "score"), "deskside eval MODEL --examples FILE"),
    **dict.fromkeys(("generate", "complete", "ask", "prompt"), "deskside chat MODEL"),
    **dict.fromkeys(
        ("fine-tune", "train"),
        "deskside finetune mails.csv; an adapter trained elsewhere goes to "
        "deskside convert BASE --adapter FOLDER --name NAME",
    ),
    **dict.fromkeys(("undo", "revert", "restore"), "deskside rollback NAME"),
    "help": "deskside --help",
    "version": "deskside --version",
}


class LazyGroup(TyperGroup):
    """A group that lists its verbs by their summaries and loads only the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Replace a verb's summary with the loaded verb. An unknown one is answered with the one that was meant."""
        asked = args[0].lower() if args else ""
        if args and args[0] not in VERBS:
            if asked in MEANT:
                ctx.fail(f"no such command {args[0]!r}; try: {MEANT[asked]}")
            if near := nearest(asked, VERBS):
                ctx.fail(f"no such command {args[0]!r}; did you mean {near!r}?")
        name, summary, rest = super().resolve_command(ctx, args)
        return name, summary if name is None else load_verb(name), rest


@dataclass
class Flags:
    """The options before the verb."""

    debug: bool = False


def load_verb(name: str) -> Any:
    """Import a verb and make its command."""
    verb = VERBS[name]
    target = getattr(importlib.import_module(verb.module), verb.factory)
    if verb.factory == "create_app":
        app = target()
    else:
        app = typer.Typer(add_completion=False)
        app.command(name)(target)
    command: Any = get_command(app)
    command.name = name
    _tidy_help(command)
    return command


def create_app(flags: Flags | None = None) -> Any:
    """Make the command `deskside`, with a summary in place of each verb."""
    flags = flags or Flags()
    app = typer.Typer(name="deskside", cls=LazyGroup, no_args_is_help=True, add_completion=False)

    @app.callback(help="Runs a team's own fine-tuned small model on the machines it already has.")
    def root(
        debug: Annotated[bool, typer.Option("--debug", envvar="DESKSIDE_DEBUG", help="Show tracebacks.")] = False,
        show_version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
        ] = False,
    ) -> None:
        flags.debug = debug

    for name, verb in VERBS.items():
        app.command(name, help=verb.help)(_summary)
    command: Any = get_command(app)
    _tidy_help(command)
    return command


def pull_command(
    model: Annotated[
        str, typer.Argument(metavar="NAME", help="A catalogue name, hf://owner/name/file@revision, or a GGUF file.")
    ],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name for the model of a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Install a model: download it, or build it where the catalogue has its recipe. An installed model is kept.

    Rebuilds a model made by an older version of its recipe; never replaces a model you made yourself.
    """
    from convert.cli import build_recipe
    from models.cli import pull_command as pull

    pull(model, name=name, as_json=as_json, build=build_recipe)


def exit_code(error: BaseException) -> int | None:
    """Look `error` up in EXIT_CODES; None for an error that is a bug."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), None)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `deskside`. Always ends in SystemExit."""
    # Before llama.cpp is loaded: its OpenMP threads spin for milliseconds at each barrier, so that beside any other
    # busy program a step takes up to ten times as long. On an idle machine the shorter spin costs nothing measurable.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    flags = Flags()
    try:
        create_app(flags).main(list(sys.argv[1:] if argv is None else argv), prog_name="deskside")
    except SystemExit as leaving:
        sys.exit(_flushed(leaving.code))
    except BaseException as error:  # noqa: BLE001  (last resort: every error is one line and an exit code)
        sys.exit(_flushed(_report(error, flags.debug)))


def _tidy_help(command: Any) -> None:
    """Join the lines of each paragraph of the help texts, and show no type beside a switch or an argument.

    The terminal's width decides where lines break. typer shows `<bool>` beside a switch, as if it took a value, and
    beside an argument the name of a Python type.
    """
    command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help or ""))
    for parameter in command.get_params(typer.Context(command)):  # `--help` included
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif getattr(parameter, "param_type_name", "") == "argument":
            parameter.display_type_rich = lambda **_: None
    for inner in getattr(command, "commands", {}).values():
        _tidy_help(inner)


def _report(error: BaseException, debug: bool) -> int:
    code = exit_code(error)
    if debug:
        traceback.print_exception(error)
    if code == INTERRUPTED:
        return INTERRUPTED
    if code is None:
        hint = "" if debug else "; `deskside --debug …` shows the traceback"
        print(f"error: {type(error).__name__}: {error} (a bug in Deskside{hint})", file=sys.stderr)
        return FAILED
    print(f"error: {error}", file=sys.stderr)
    return code


def _flushed(code: str | int | None) -> str | int | None:
    """Flush stdout and return `code`. A reader that closed the pipe (`| head`) is not reported."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deskside {version('deskside')}")
        raise typer.Exit


def _summary() -> None:
    raise AssertionError("a summary exists for the help text only")


if __name__ == "__main__":
    main()
