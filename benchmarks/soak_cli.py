"""`deskside bench soak`: run it, save it, say what held; exit code 1 when something did not."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import show_progress
from .options import with_options
from .soak_settings import SoakSettings

if TYPE_CHECKING:
    from .soak_checks import Check, SoakRun

FAILED = 1
MARKS = {True: "ok", False: "FAILED", None: "not checked"}


@with_options(settings=SoakSettings)
def soak_command(
    settings: SoakSettings, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False
) -> None:
    """Load a server of our own at twice its capacity, with disconnects, bad requests and kills, and check it."""
    from .record import save_json
    from .soak import soak
    from .soak_checks import check

    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    out = settings.out or Path("results") / f"soak-{started}.json"
    with show_progress() as progress:
        run = soak(settings, out.with_suffix(".log"), progress)
    checks = check(run)
    shown = [line.model_dump(mode="json") for line in checks]
    save_json(out, run.model_dump(mode="json") | {"checks": shown})
    if as_json:
        print(json.dumps({"checks": shown, "out": str(out)}, ensure_ascii=False, indent=2))
    else:
        _print(run, checks)
    print(f"all outcomes: {out}; the server's own output: {out.with_suffix('.log')}", file=sys.stderr)
    if any(line.passed is False for line in checks):
        raise typer.Exit(FAILED)


def _print(run: "SoakRun", checks: "Sequence[Check]") -> None:
    clients = f"{run.clients} clients at a capacity of {run.capacity}"
    print(f"{run.model}, {run.minutes:g} minutes, {clients}, seed {run.seed}")
    kinds = Counter((outcome.kind, outcome.end) for outcome in run.outcomes)
    for kind in sorted({kind for kind, _ in kinds}):
        ends = ", ".join(f"{number} {end}" for (name, end), number in sorted(kinds.items()) if name == kind)
        print(f"  {kind}: {ends}")
    for line in checks:
        print(f"{MARKS[line.passed]:<12}{line.name}: {line.found}")
