"""`deskside bench convert`: our conversion beside that of llama.cpp's own converter, of one checkpoint in one run."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import show_progress
from .convert_record import ConvertRun, ConvertSettings
from .options import with_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .convert_record import Aim

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_Again = Annotated[Path | None, typer.Option("--report", help="Show this run's file again instead of measuring.")]


@with_options(settings=ConvertSettings)
def convert_speed_command(settings: ConvertSettings, as_json: _Json = False, report: _Again = None) -> None:
    """Measure `deskside convert` beside llama.cpp's converter: wall time, peak memory and install size."""
    from .convert_record import judge, load_convert_run
    from .convert_speed import clean, compare_converters
    from .record import save_json

    if report is not None:
        run = load_convert_run(report)
    else:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        out = settings.out or Path("results") / f"convert-{started}.json"
        with show_progress() as progress:
            run = compare_converters(settings, progress)
        save_json(out, run.model_dump(mode="json"))
        clean(settings)
        print(f"raw samples: {out}", file=sys.stderr)
    aims = judge(run)
    if as_json:
        shown = [aim.model_dump(mode="json") | {"ratio": aim.ratio, "reached": aim.reached} for aim in aims]
        print(json.dumps(run.model_dump(mode="json") | {"aims": shown}, ensure_ascii=False, indent=2))
    else:
        _print(run, aims)


def _print(run: ConvertRun, aims: "Sequence[Aim]") -> None:
    machine = run.machine
    print(f"{run.checkpoint}, {run.parameters / 1e6:.0f} M parameters, {run.checkpoint_bytes / 2**20:.0f} MiB, to F16")
    print(f"{machine.cpu}, {machine.logical_cores} cores, {machine.system}, Python {machine.python}")
    for need in run.needs:
        versions = ", ".join(f"{name} {version}" for name, version in need.versions.items())
        print(f"  {need.converter}: {run.commands[need.converter]} ({versions})")
    print(f"{run.equal_tensors} of {run.tensors} tensors are equal byte for byte")
    for aim in aims:
        said = f"{aim.deskside:.2f} {aim.unit} against {aim.llama_cpp:.2f} {aim.unit}"
        verdict = "reached" if aim.reached else "MISSED"
        print(f"  {aim.name}: {said}, {aim.ratio:.2f}x (aim: at most {aim.limit:g}x, {verdict})")
    repetitions = sum(one.converter == "deskside" for one in run.conversions)
    print(f"Times and memory are medians of {repetitions} runs each, in turn, the checkpoint in the page cache.")
