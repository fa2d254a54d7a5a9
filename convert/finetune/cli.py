"""`deskside finetune`: train an adapter, or a whole model, on chat records. The front door handles errors."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from models.common.options import JsonOption, with_options

from .settings import FinetuneRequest, FinetuneSettings

if TYPE_CHECKING:
    from .settings import FinetuneResult

FOLDER = "trained"
"""Folder of the store that results go to, unless the user names another."""


@with_options(request=FinetuneRequest, settings=FinetuneSettings)
def finetune_command(request: FinetuneRequest, settings: FinetuneSettings, as_json: JsonOption = False) -> None:
    """Train a model on your own examples, on this machine: chat records in, a PEFT adapter out.

    Measures a few steps first and says how long it takes; --minutes chooses layers and epochs that fit, or refuses.
    The epoch that is best on the validation examples is kept. Run again after a kill, it resumes.

    Answers that repeat are labels, each scored in full; other answers are judged by the loss of their tokens.
    """
    from models.common.console import page

    result, base = _run(request, settings)
    if as_json:
        typer.echo(json.dumps({**asdict(result), "trained": str(result.trained)}))
        return
    for line in summary(result, request, base):
        page(stderr=True).print(line)
    typer.echo(str(result.trained))


def summary(result: "FinetuneResult", request: FinetuneRequest, base: str) -> list[str]:
    """Describe the result, and the command to make a model of it."""
    best = result.best
    score = f"accuracy {best.accuracy:.3f}, " if best.accuracy is not None else ""
    what = f"on the validation examples {score}loss {best.loss:.3f}" if request.validation else "no validation examples"
    lines = [f"trained in {result.seconds / 60:.1f} minutes, epoch {best.epoch} of {len(result.epochs)}: {what}"]
    named = f" --name {request.name}" if request.name is not None else " --name NAME"
    examples = f" --examples {request.validation}" if request.validation is not None else ""
    if result.trained.is_dir():
        return [*lines, f"next: deskside convert {base} --adapter {result.trained}{named}{examples}"]
    return [*lines, f"next: deskside convert {result.trained}{named}{examples}"]


def _run(request: FinetuneRequest, settings: FinetuneSettings) -> "tuple[FinetuneResult, str]":
    from convert.planning.origin import find_origin
    from models.common.console import reporter
    from models.store.store import Store

    from .examples import read_records
    from .train import check_installed, finetune

    check_installed()
    train, validation = read_records(request.train), read_records(request.validation)
    store, report = Store(), reporter()
    out = _out(request)
    try:
        origin = find_origin(request.base, None, store, report)
        result = finetune(origin.path, train, validation, None, settings, out, report)
    finally:
        report.close()
    return result, request.base


def _out(request: FinetuneRequest) -> Path:
    """The folder for the result. Raises RequestInvalid when neither it nor a name is given."""
    from convert.errors import RequestInvalid
    from models.common.files import default_home
    from models.store.store import check_name

    if request.out is not None:
        return request.out
    if request.name is None:
        raise RequestInvalid("--name NAME or --out DIR is missing: where the result goes")
    return default_home() / FOLDER / check_name(request.name)
