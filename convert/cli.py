"""`deskside convert` and `deskside finetune`: the verbs that make models. The front door handles errors."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from models.common.options import JsonOption, with_options

from .finetune.request import FinetuneRequest
from .planning.request import ConvertRequest
from .training.settings import FinetuneSettings

if TYPE_CHECKING:
    from convert.finetune.chain import Finetuned
    from models.manifest import Manifest
    from models.store.catalog import CatalogEntry
    from models.store.store import Store, StoredModel


@with_options(request=ConvertRequest)
def convert_command(request: ConvertRequest, as_json: JsonOption = False) -> None:
    """Make a model: merge an adapter into a checkpoint, quantize it, check that it runs, and install it.

    With --examples every quantization worth trying is measured on this machine and on your own examples. The fastest
    that loses no more than the budget is installed, with the table on its card.

    A recipe that cuts its vocabulary also does so with --quant or --examples; --whole-vocab leaves it whole.

    With --hot the adapter stays a file of its own, which the server applies to the untouched SOURCE: no change of the
    fine-tune is rounded away, and many adapters share one SOURCE in memory.
    """
    from models.common.console import page
    from models.store.store import Store

    stored = _run(request, Store())
    if as_json:
        shown = stored.manifest.model_dump(mode="json", exclude_none=True) if stored.manifest is not None else {}
        typer.echo(json.dumps({"name": stored.name, "gguf": str(stored.gguf), "manifest": shown}))
    else:
        for line in summary(stored):
            page(stderr=True).print(line)
        typer.echo(f"{stored.name}\t{stored.gguf}")


@with_options(request=FinetuneRequest, settings=FinetuneSettings)
def finetune_command(request: FinetuneRequest, settings: FinetuneSettings, as_json: JsonOption = False) -> None:
    """Train a model on your own examples, on this machine, and install it: a table or a task in, a served name out.

    The examples are checked first. A few steps are measured to say how long it takes; --minutes chooses layers and
    epochs that fit, or refuses. The epoch that is best on the validation examples is kept. Run again after a kill,
    the training resumes. Then the fastest file that loses no more on them than the budget is chosen, as convert does.
    """
    # Before numpy is loaded: the check's products are small, and two threads would wait for each other.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from models.common.console import page, reporter
    from models.store.store import Store

    from .finetune.chain import finetune_task

    report = reporter()
    try:
        done = finetune_task(request, settings, Store(), report)
    finally:
        report.close()
    if as_json:
        named, length = done.stored.name if done.stored is not None else None, done.asked.prompt.max_text_tokens
        shown = {**asdict(done.result), "trained": str(done.result.trained), "task": done.task.name, "name": named}
        shown["max_text_tokens"] = length
        typer.echo(json.dumps(shown))
        return
    for line in trained_summary(done):
        page(stderr=True).print(line)
    typer.echo(f"{done.stored.name}\t{done.stored.gguf}" if done.stored is not None else str(done.result.trained))


def trained_summary(done: "Finetuned") -> list[str]:
    """Describe the fine-tune and the model made of it, and the next command."""
    from convert.replacement import command_of

    best, conversion = done.result.best, done.conversion
    score = f"accuracy {best.accuracy:.3f}, " if best.accuracy is not None else ""
    minutes, epochs = done.result.seconds / 60, len(done.result.epochs)
    line = f"trained in {minutes:.1f} minutes, epoch {best.epoch} of {epochs}: "
    line += f"on the validation examples {score}loss {best.loss:.3f}"
    if (length := done.asked.prompt.max_text_tokens) is not None:
        line += f"; texts are read to their first {length} tokens, here and when served ({done.asked.n_cut} were cut)"
    if done.stored is not None:
        return [line, *summary(done.stored)]
    return [line, f"next: {command_of(conversion)}"]


def summary(stored: "StoredModel") -> list[str]:
    """Describe the model that was made, the reason for its choice, and the command to use it with."""
    from models.cli import describe_version
    from models.common.machine import mebibytes
    from models.quality import QUALITY_FILE, read_quality
    from models.store.store import Store

    manifest = stored.manifest
    assert manifest is not None, "convert has written it"
    artefact = manifest.artefacts[0]
    lines = [f"installed {stored.name}: {artefact.quantization}, {mebibytes(artefact.size_bytes)}"]
    if (stored.folder / QUALITY_FILE).is_file():
        quality = read_quality(stored.folder)
        chosen = next(one for one in quality.candidates if one.name == quality.chosen)
        lines.append(f"  {chosen.reason}")
        if (answers := chosen.answers) is not None:
            if (score := answers.score) is not None:
                interval = f"{score.difference_low:+.3f} to {score.difference_high:+.3f}"
                lines.append(
                    f"  {score.metric} {score.mean:.3f}, {interval} to F16's {score.reference_mean:.3f} (95 %)"
                )
            lines.append(f"  {answers.flips} of {answers.total} answers differ from F16's")
        lines.append(f"  `deskside models show {stored.name}` shows all {len(quality.candidates)} files measured")
    if (calibration := manifest.calibration) is not None:
        from models.card.calibration import promise_told

        own = calibration.promise()
        assert own is not None, "a calibration has a promise for its own target"
        lines.append(f"  automatic answers, right with a share of {promise_told(own, calibration.examples)}")
    if not manifest.labels and manifest.task == "general":
        asks = "refuses it" if manifest.fine_tuned else "asks it in the words of each question, not as it was trained"
        lines.append(f"  its task is not known: /v1/decisions {asks}; --examples FILE would record task and labels")
    if (before := Store().previous(stored.name)) is not None:
        lines.append(f"  the version before is kept: {describe_version(before)}; deskside rollback {stored.name}")
    base = f"{manifest.base.name}:" if manifest.kind == "adapter" and manifest.base is not None else ""
    return [*lines, f"next: deskside serve {base}{stored.name}"]


def build_recipe(entry: "CatalogEntry", store: "Store") -> "StoredModel":
    """Build the recipe `entry` with its own settings, as `deskside pull` does. Returns the installed model.

    A second process that builds the same recipe waits for the first and takes its result. A model that an earlier
    version of the recipe built is rebuilt. A model of that name made from something else stays: it may be the user's
    own.
    """
    from models.manifest import read_manifest

    with store.exclusive(entry.name):
        if entry.name not in store.names():
            return _run(ConvertRequest(source=entry.name), store)
        stored, recipe = store.get(entry.name), read_manifest(entry.recipe_folder())
        if _is_outdated(stored, recipe) or _has_old_template(stored, entry.recipe_folder(), store):
            print(f"{entry.name!r} was built by an older recipe; rebuilding", file=sys.stderr)
            return _run(ConvertRequest(source=entry.name, replace=True), store)
    if _weights(recipe) != _weights(stored.manifest):
        fix = f"`deskside convert {entry.name} --replace` builds the recipe's"
        message = f"{entry.name!r} is installed, but from another adapter or base than the recipe's; {fix}"
        print(f"warning: {message}", file=sys.stderr)
    return stored


def _is_outdated(stored: "StoredModel", recipe: "Manifest") -> bool:
    """True if the model is the recipe's own, of the same weights, but converted with older settings."""
    made = stored.manifest
    if made is None or not _is_its_own(made, recipe):
        return False
    return (made.conversion, made.calibration) != (recipe.conversion, recipe.calibration)


def _is_its_own(made: "Manifest", recipe: "Manifest") -> bool:
    # only a build with the recipe's own settings carries its figures
    return bool(made.quality) and _weights(made) == _weights(recipe)


def _has_old_template(stored: "StoredModel", folder: Path, store: "Store") -> bool:
    """True if the model is the recipe's own, but has another chat template than a build would give it now."""
    from convert.tokenizer.chat_template import TEMPLATE_FIELD, choose_format, gemma_turns
    from models.gguf.header import read_header, read_meta
    from models.manifest import read_manifest

    recipe, made = read_manifest(folder), stored.manifest
    if made is None or not _is_its_own(made, recipe) or recipe.base is None or recipe.adapter is None:
        return False
    template = read_meta(stored.gguf).text(TEMPLATE_FIELD)
    # A base's header takes long to read, and nearly every recipe's template is Gemma's.
    if template == gemma_turns() or recipe.base.name not in store.names():
        return False
    wanted = choose_format(read_header(store.get(recipe.base.name).gguf), folder / recipe.adapter.path)
    return template != (wanted.template or "")


def _weights(manifest: "Manifest | None") -> tuple[str | None, str | None]:
    base, adapter = (manifest.base, manifest.adapter) if manifest is not None else (None, None)
    return base.sha256 if base is not None else None, adapter.sha256 if adapter is not None else None


def _run(request: ConvertRequest, store: "Store") -> "StoredModel":
    from models.common.console import reporter

    from .pipeline import convert

    report = reporter()
    try:
        return convert(request, store, report)
    finally:
        report.close()
