"""`deskside models …` and `deskside pull`: data on stdout, progress on stderr. `runtime.cli.main` reports errors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.common.machine import mebibytes

from .errors import BadManifest, HashMismatch, ModelError

if TYPE_CHECKING:
    from models.common.files import Progress
    from models.store.pull import Build
    from models.store.store import Store, StoredModel

_NameArgument = Annotated[str, typer.Argument(help="An installed model.", metavar="NAME")]
# That of `common.options` loads pydantic.
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def create_app() -> typer.Typer:
    """The verbs of `deskside models`."""
    app = typer.Typer(name="models", help="Manage installed models.", no_args_is_help=True, add_completion=False)
    app.command("list")(list_command)
    app.command("show")(show_command)
    app.command("verify")(verify_command)
    app.command("remove")(remove_command)
    return app


def list_command(as_json: _Json = False) -> None:
    """List the installed models, and those that `deskside pull` knows by name."""
    from models.store.catalog import load_catalog
    from models.store.store import Store

    store = Store()
    rows = [_row(store, name) for name in store.names()]
    catalog = load_catalog()
    known = [catalog.get(name) for name in catalog.names() if name not in store.names()]
    rows += [_blank_row(entry.name, "not installed", entry.description) for entry in known]
    (_print_json if as_json else _print_rows)(rows)


def show_command(name: _NameArgument, as_json: _Json = False) -> None:
    """Show a model: purpose, measured quality, how to run and ask it, files, origin and licence."""
    from models.card.terminal import print_model
    from models.gguf.header import has_chat_template
    from models.quality import QUALITY_FILE, read_quality
    from models.store.store import Store

    store = Store()
    stored = store.resolve(name)
    before = store.previous(stored.name) if stored.name in store.names() else None
    if as_json:
        _print_json(_described(stored) | {"previous": str(before.folder) if before is not None else None})
    elif stored.manifest is None:
        typer.echo(f"{stored.gguf}: a GGUF file without a manifest, {stored.gguf.stat().st_size} bytes")
    else:
        card = stored.folder / "README.md"
        quality = read_quality(stored.folder) if (stored.folder / QUALITY_FILE).is_file() else None
        where = str(card) if card.is_file() else ""
        print_model(stored.manifest, quality, where, chats=has_chat_template(stored.gguf))
        if before is not None:
            typer.echo(f"\nThe version before it: {describe_version(before)}\ndeskside rollback {stored.name}")


def verify_command(
    names: Annotated[list[str] | None, typer.Argument(help="Installed models; default: all.", metavar="NAME")] = None,
) -> None:
    """Hash the files of models and compare with the manifest."""
    from models.store.store import Store

    store = Store()
    failures: list[ModelError] = []
    for name in names or store.names():
        try:
            with _progress(f"verify {name}") as progress:
                store.verify(name, progress)
        except (HashMismatch, BadManifest) as error:
            failures.append(error)
        else:
            typer.echo(f"{name}: ok")
    if failures:
        raise type(failures[0])("\n".join(map(str, failures)))


def remove_command(name: _NameArgument) -> None:
    """Delete an installed model, and the one that it replaced, if that is kept for `deskside rollback`."""
    from models.store.store import Store

    both = Store().remove(name)
    typer.echo(f"{name}: removed" + (", with the version before it" if both else ""), err=True)


def rollback_command(name: _NameArgument, as_json: _Json = False) -> None:
    """Bring back the model that was replaced last under this name; a second time, the newer one again.

    Servers that run keep the file that they have open; restart them to serve what was brought back.
    """
    from models.store.store import Store

    store = Store()
    stored = store.rollback(name)
    aside = store.previous(name)
    typer.echo(f"{name} is again {describe_version(stored)}", err=True)
    kept = describe_version(aside) if aside is not None else "the newer one, which is damaged"
    typer.echo(f"kept aside: {kept}; `deskside rollback {name}` swaps them again", err=True)
    if as_json:
        _print_json(_described(stored))
    else:
        typer.echo(f"{stored.name}: {stored.gguf}")


def describe_version(stored: "StoredModel") -> str:
    """The quantization, the size and the date that tell a version from another."""
    from models.manifest import MANIFEST_FILE

    manifest = stored.manifest
    assert manifest is not None, "a model of the store has one"
    first = manifest.artefacts[0]
    made = datetime.fromtimestamp((stored.folder / MANIFEST_FILE).stat().st_mtime).astimezone()
    return f"{first.quantization}, {mebibytes(first.size_bytes)}, made {made:%Y-%m-%d %H:%M}"


def pull_command(
    model: str,
    *,
    name: str | None = None,
    as_json: bool = False,
    build: "Build | None" = None,
) -> None:
    """Install a model by its catalogue name, hf:// address or path. `build` builds recipes: `models` cannot convert.

    `runtime.cli.main` declares the options and passes `build`.
    """
    from models.store.pull import pull
    from models.store.store import Store

    with _progress(f"pull {model}") as progress:
        stored = pull(model, Store(), progress=progress, name=name, build=build)
    if as_json:
        _print_json(_described(stored))
    else:
        typer.echo(f"{stored.name}: {stored.gguf}")


@contextmanager
def _progress(what: str) -> Iterator["Progress"]:
    """A bar of bytes, drawn from the first report on."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from models.common.console import ProgressBars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ProgressBars(*columns, TimeRemainingColumn()) as bars:
        yield partial(bars.update, what)


def _row(store: "Store", name: str) -> dict[str, Any]:
    try:
        manifest = store.get(name).manifest
    except ModelError as error:
        return _blank_row(name, "damaged", str(error))
    if manifest is None:
        return _blank_row(name, "installed", "")
    return {
        "name": name,
        "state": "installed",
        "kind": manifest.kind,
        "quantization": manifest.artefacts[0].quantization,
        "size_bytes": sum(artefact.size_bytes for artefact in manifest.artefacts),
        "description": manifest.description,
    }


def _blank_row(name: str, state: str, description: str) -> dict[str, Any]:
    blank = {"name": name, "state": state, "kind": None, "quantization": None, "size_bytes": None}
    return blank | {"description": description}


def _described(stored: "StoredModel") -> dict[str, Any]:
    manifest = stored.manifest.model_dump(mode="json") if stored.manifest is not None else None
    return {"name": stored.name, "folder": str(stored.folder), "gguf": str(stored.gguf), "manifest": manifest}


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("Name", "State", "Kind", "Quantization", "Size"):
        table.add_column(column, no_wrap=True)
    table.add_column("Description", overflow="fold")
    for row in rows:
        size = mebibytes(row["size_bytes"]) if row["size_bytes"] is not None else ""
        table.add_row(row["name"], row["state"], row["kind"] or "", row["quantization"] or "", size, row["description"])
    # Descriptions are other people's text: square brackets in them are no markup.
    Console(markup=False).print(table)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
