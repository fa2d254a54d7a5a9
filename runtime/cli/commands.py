"""The verbs of the runtime: options in, one call, output and exit code.

Everything heavy is imported inside a command, so that its help text costs nothing.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from models.common.options import JsonOption, with_options
from models.common.record import Record
from models.errors import DONE, FAILED, SOME_FAILED
from models.store.catalog import DEFAULT_MODEL
from runtime.config import BatchConfig, EngineConfig, RuntimeConfig

MODEL_HELP = "An installed model, a path to a GGUF file, or BASE:ADAPTER."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=DEFAULT_MODEL)
]


@with_options(config=RuntimeConfig)
def serve_command(config: RuntimeConfig, models: ModelsArgument = None) -> None:
    """Serve models to any OpenAI client until SIGINT or SIGTERM; running answers are finished first.

    A request chooses a model by its field `model`; without that field, the first model answers.
    """
    from runtime.server.serve import serve

    _make_folder(config)
    serve(config, models or [DEFAULT_MODEL])


@with_options(engine=BatchConfig)
def batch_command(
    engine: BatchConfig,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="OpenAI batch lines: custom_id, url, body.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Answers, in the order of completion.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)],
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests. Rerun the same command to resume. Failed lines go to OUT.errors.jsonl (exit 3)."""
    from runtime.batch.run import run_files

    _make_folder(engine)
    summary = run_files(source, output, model, RuntimeConfig(**dict(engine)))
    if as_json:
        print(json.dumps(summary), flush=True)
    if summary["interrupted"]:
        raise KeyboardInterrupt
    raise typer.Exit(SOME_FAILED if summary["failed"] else DONE)


class ChatOptions(Record):
    """Options of every answer; None leaves the choice to the model's task."""

    temperature: float | None = Field(default=None, ge=0, le=2, description="0: always the likeliest token.")
    top_p: float = Field(default=1.0, ge=0.01, le=1, description="Sample from the tokens with this probability mass.")
    max_tokens: int | None = Field(default=None, ge=1, description="Length limit of an answer, in tokens.")
    seed: int | None = Field(
        default=None, ge=0, description="The same random numbers, and with them the same answers, again."
    )
    system: str | None = Field(default=None, description="System message of the conversation.")


@with_options(options=ChatOptions, engine=EngineConfig)
def chat_command(engine: EngineConfig, options: ChatOptions, model: ModelArgument = DEFAULT_MODEL) -> None:
    """Talk to a model. From a pipe: one message per line in, one answer per line out."""
    from .chat import chat_with

    _make_folder(engine)
    chat_with(model, RuntimeConfig(**dict(engine)), options)


def _make_folder(config: EngineConfig) -> None:
    """Make the folder of `--prefix-disk` before anything is loaded. Raises LoadFailed if it cannot be written."""
    if config.prefix_disk is not None:
        from runtime.prefixes.folder import prepare

        prepare(config.prefix_disk)


def doctor_command(as_json: JsonOption = False) -> None:
    """Show what this machine has, what is installed and what is missing, each with the command that fixes it."""
    from models.store.store import Store

    from .doctor import examine, print_report

    report = examine(Store())
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)
    raise typer.Exit(DONE if report.healthy else FAILED)
