"""`deskside convert`: a checkpoint and an adapter become an installed model. Errors are left to the front door."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from models.quality import TaskKind

if TYPE_CHECKING:
    from convert.planning.inputs import ConvertRequest
    from models.manifest import Manifest
    from models.store.catalog import CatalogEntry
    from models.store.store import Store, StoredModel


def _file(said: str) -> OptionInfo:
    info: OptionInfo = typer.Option(metavar="FILE", help=said)
    return info


_work = typer.Option("--for", help="What they are examples of.", show_default="by their answers")
_loss = typer.Option(metavar="NATS", help="Mean KL divergence a candidate may have.", show_default="0.02")
_keep = typer.Option(metavar="N", help="Tokens that a cut vocabulary has.", show_default="32768")


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder, hf://owner/name@revision, an installed or known model, "
            "hf://owner/name/file.gguf, a .gguf file, or a recipe of the catalogue (email-triage).",
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="PEFT LoRA adapter to merge.")] = None,
    hot: Annotated[
        bool, typer.Option("--hot", help="Do not merge: install the adapter, to be served as SOURCE:NAME.")
    ] = False,
    examples: Annotated[Path | None, _file("JSONL of chat records: choose the quantization by them.")] = None,
    work: Annotated[TaskKind | None, _work] = None,
    max_loss: Annotated[float | None, _loss] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="F16, Q8_0, Q6_K, Q5_K_M, Q5_0, Q4_K_M, Q4_0, IQ4_NL or a mixed layout such as Q8_0-vocab-Q4_0, "
            "whatever the examples say.",
            show_default="Q8_0",
        ),
    ] = None,
    trim_vocab: Annotated[Path | None, _file("JSONL of chat records: cut the vocabulary to what they need.")] = None,
    keep: Annotated[int | None, _keep] = None,
    whole_vocab: Annotated[bool, typer.Option("--whole-vocab", help="Do not cut it, though the recipe does.")] = False,
    gguf: Annotated[Path | None, _file("Weights that another converter made of the folder SOURCE.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What to call it; a recipe has a name.")] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="model.toml with description, task, labels, prompt, licence.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an installed model of that name.")] = False,
    keep_f16: Annotated[bool, typer.Option("--keep-f16", help="Keep the unquantized file as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Make a model: merge an adapter into a checkpoint, quantize it, check that it runs, and install it.

    With --examples every quantization worth trying is measured on this machine and on your own examples, and the
    fastest that loses no more than the budget is installed, with the table on its card.

    A recipe that cuts its vocabulary does so whatever --quant and --examples say; --whole-vocab leaves it whole.

    With --hot the adapter stays a file of its own, which is applied while the untouched SOURCE is served: nothing of
    the fine-tune is rounded away, and many adapters share one SOURCE in memory.
    """
    from convert.planning.inputs import ConvertRequest
    from models.store.store import Store

    request = ConvertRequest(
        source=source,
        name=name,
        adapter=adapter,
        quantization=quant,
        manifest=manifest,
        replace=replace,
        keep_f16=keep_f16,
        hot=hot,
        gguf=gguf,
        examples=examples,
        work=work,
        max_loss=max_loss,
        trim=trim_vocab,
        keep=keep,
        whole_vocabulary=whole_vocab,
    )
    stored = _run(request, Store())
    if as_json:
        shown = stored.manifest.model_dump(mode="json", exclude_none=True) if stored.manifest is not None else {}
        typer.echo(json.dumps({"name": stored.name, "gguf": str(stored.gguf), "manifest": shown}))
    else:
        typer.echo(f"{stored.name}\t{stored.gguf}")


def build_recipe(entry: "CatalogEntry", store: "Store") -> "StoredModel":
    """Build a catalogue entry that is a recipe, with its own settings: what `deskside pull` does for such a name.

    A second process that wants the same waits for the first and takes what it made. What an earlier version of the
    recipe built is built anew. A model of that name that was made from something else stays: it may be the user's own.
    """
    from convert.planning.inputs import ConvertRequest
    from models.manifest import read_manifest

    with store.exclusive(entry.name):
        if entry.name not in store.names():
            return _run(ConvertRequest(entry.name), store)
        stored, recipe = store.get(entry.name), read_manifest(entry.recipe_folder())
        if _is_outdated(stored, recipe):
            print(f"{entry.name!r} is converted otherwise by now: building it anew", file=sys.stderr)
            return _run(ConvertRequest(entry.name, replace=True), store)
    if _weights(recipe) != _weights(stored.manifest):
        fix = f"`deskside convert {entry.name} --replace` builds the recipe's"
        message = f"{entry.name!r} is installed, but from another adapter or base than the recipe's; {fix}"
        print(f"warning: {message}", file=sys.stderr)
    return stored


def _is_outdated(stored: "StoredModel", recipe: "Manifest") -> bool:
    """Whether it is the recipe's own, of the same weights, but not converted as the recipe has it now."""
    made = stored.manifest
    # the recipe's figures go with what is built by its own settings, and with nothing else
    is_its_own = made is not None and bool(made.quality) and _weights(made) == _weights(recipe)
    return is_its_own and made is not None and made.conversion != recipe.conversion


def _weights(manifest: "Manifest | None") -> tuple[str | None, str | None]:
    base, adapter = (manifest.base, manifest.adapter) if manifest is not None else (None, None)
    return base.sha256 if base is not None else None, adapter.sha256 if adapter is not None else None


def _run(request: "ConvertRequest", store: "Store") -> "StoredModel":
    from models.common.console import reporter

    from .pipeline import convert

    report = reporter()
    try:
        return convert(request, store, report)
    finally:
        report.close()
