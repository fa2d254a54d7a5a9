"""`deskside bench trim`: the default model with its vocabulary trimmed beside the whole one, in one run."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from .console import show_progress
from .options import with_options
from .trim_record import TrimRun, TrimSettings, load_trim_run, ratios

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Again = Annotated[Path | None, typer.Option("--report", help="Show this run's file again instead of measuring.")]


@with_options(settings=TrimSettings)
def trim_command(settings: TrimSettings, as_json: _Json = False, report: _Again = None) -> None:
    """Measure what trimming the default model's vocabulary gains: file size, decode and prefill speed."""
    from .record import save_json
    from .trim_speed import compare_trimmed

    if report is not None:
        run = load_trim_run(report)
    else:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        out = settings.out or Path("results") / f"trim-{started}.json"
        with show_progress() as progress:
            run = compare_trimmed(settings, progress)
        save_json(out, run.model_dump(mode="json"))
        print(f"medians: {out}", file=sys.stderr)
    if as_json:
        shown = {trimmed.kind: [one.model_dump(mode="json") for one in found] for trimmed, _, found in ratios(run)}
        print(json.dumps(run.model_dump(mode="json") | {"ratios": shown}, ensure_ascii=False, indent=2))
    else:
        _print(run)


def _print(run: TrimRun) -> None:
    machine = run.machine
    weights = "; weights as they lie in the file, not repacked" if run.as_stored else ""
    print(f"{machine.cpu}, {machine.logical_cores} cores, {machine.system}; {run.backend}{weights}")
    for trimmed, whole, found in ratios(run):
        sizes = f"{trimmed.size_bytes / 2**20:.0f} MiB of {whole.size_bytes / 2**20:.0f} MiB"
        print(f"{trimmed.kind}: {trimmed.tokens} of {whole.tokens} tokens, {sizes}")
        for one in found:
            verdict = {None: "", True: ", aim reached", False: ", aim MISSED"}[one.reached]
            print(f"  {one.name}: {one.value:.3f} of the whole vocabulary's{verdict}")
    shape = f"{run.prompt_tokens} tokens of prompt"
    print(f"Medians of {run.repetitions} repetitions in turns, each file in a process of its own; {shape}.")
