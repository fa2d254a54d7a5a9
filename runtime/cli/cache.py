"""`deskside cache`: the prefixes that servers keep on disk, listed and cleared."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from models.common.machine import mebibytes
from models.common.options import JsonOption, variable
from models.errors import DONE, SOME_FAILED
from runtime.config import EngineConfig

VARIABLE = str(variable(EngineConfig, "prefix_disk"))
FolderArgument = Annotated[
    Path | None,
    typer.Argument(metavar="DIR", envvar=VARIABLE, help="The folder of `--prefix-disk`.", show_default=False),
]


def create_app() -> typer.Typer:
    """The verbs of `deskside cache`."""
    app = typer.Typer(
        name="cache", help="List and clear the prefixes on disk.", no_args_is_help=True, add_completion=False
    )
    app.command("list")(list_command)
    app.command("clear")(clear_command)
    return app


def list_command(folder: FolderArgument = None, as_json: JsonOption = False) -> None:
    """List what is kept: for each model and way of computing the files, tokens, bytes, and the last use."""
    from runtime.prefixes.folder import shelves

    root = _existing(folder)
    rows = [_row(shelf) for shelf in shelves(root)]
    if as_json:
        print(json.dumps({"folder": str(root), "prefixes": rows}, indent=2, ensure_ascii=False))
    elif rows:
        _print_rows(rows)
    else:
        typer.echo(f"no prefixes are kept in {str(root)!r}", err=True)


def clear_command(folder: FolderArgument = None) -> None:
    """Delete all prefixes on disk, and nothing else; a server that uses them computes them again."""
    from runtime.prefixes.folder import clear

    root = _existing(folder)
    cleared = clear(root)
    for failure in cleared.failures:
        typer.echo(f"not deleted: {failure}", err=True)
    typer.echo(f"{str(root)!r}: {cleared.n_files} files deleted, {mebibytes(cleared.n_bytes)}", err=True)
    raise typer.Exit(SOME_FAILED if cleared.failures else DONE)


def _existing(folder: Path | None) -> Path:
    """The folder that was named. Raises BadParameter if none was, NotADirectoryError if there is none."""
    if folder is None:
        raise typer.BadParameter(f"name the folder (the one of `--prefix-disk`), or set {VARIABLE}")
    root = folder.expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"there is no folder {str(root)!r}; `--prefix-disk` of `deskside serve` makes it")
    return root


def _row(shelf: Any) -> dict[str, Any]:
    known = shelf.identity
    return {
        "model": known.model if known else None,
        "sha256": known.sha256 if known else None,
        "library": known.library if known else None,
        "computing": known.computing if known else None,
        "folder": str(shelf.folder),
        "files": shelf.n_files,
        "damaged": shelf.n_damaged,
        "tokens": shelf.n_tokens,
        "bytes": shelf.n_bytes,
        "idle_seconds": max(0, round(time.time() - shelf.used_ns / 1e9)),
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from models.common.console import page

    table = Table(box=None, pad_edge=False)
    for column in ("Model", "Files", "Tokens", "Size", "Last used"):
        table.add_column(column, no_wrap=True)
    table.add_column("Computed with", overflow="fold")
    for row in rows:
        damaged = f" ({row['damaged']} damaged)" if row["damaged"] else ""
        how = f"{row['library']}, {row['computing']}" if row["model"] is not None else "unknown"
        table.add_row(
            row["model"] or Path(row["folder"]).name[:12],
            f"{row['files']:,}{damaged}",
            f"{row['tokens']:,}",
            mebibytes(row["bytes"]),
            f"{human_time(row['idle_seconds'])} ago",
            how,
        )
    page().print(table)


def human_time(seconds: float) -> str:
    """Format `seconds` in the largest unit that keeps it above 1."""
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} seconds"
