"""`deskside bench peers`: other servers beside ours, in one run."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import show_progress
from .options import with_options
from .peer_settings import PeerSettings

if TYPE_CHECKING:
    from .peer_record import PeerRun

SOME_FAILED = 3
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Again = Annotated[Path | None, typer.Option("--report", help="Show this run's file again instead of measuring.")]


@with_options(settings=PeerSettings)
def peers_command(settings: PeerSettings, as_json: _Json = False, report: _Again = None) -> None:
    """Measure Deskside beside llama-server, llama_cpp.server and CTranslate2, with the same files and threads."""
    from .peer_plan import compare_peers
    from .peer_record import load_peer_run

    if report is not None:
        _show(load_peer_run(report), as_json=as_json)
        return
    with show_progress() as progress:
        run, out = compare_peers(settings, progress)
    _show(run, as_json=as_json)
    print(f"raw samples: {out}; the servers' own output: {out.with_suffix('.logs')}", file=sys.stderr)
    if any(sample.error for made in run.passes for sample in made.samples):
        raise typer.Exit(SOME_FAILED)


def _show(run: "PeerRun", *, as_json: bool) -> None:
    from rich.console import Console

    from .peer_aims import judge
    from .peer_figures import figures_of
    from .peer_report import render_peers

    figures = figures_of(run)
    aims = judge(figures)
    if as_json:
        shown = run.model_dump(mode="json", exclude={"passes"})
        shown |= {"figures": figures.model_dump(mode="json"), "aims": [aim.model_dump(mode="json") for aim in aims]}
        print(json.dumps(shown, ensure_ascii=False, indent=2))
        return
    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=190, soft_wrap=True)
    render_peers(run, figures, aims, console)
