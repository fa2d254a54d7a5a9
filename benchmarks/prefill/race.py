"""`deskside bench prefill`: prompts by llama.cpp's matrix products and by Deskside's, timed in turns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import Field

from benchmarks.errors import ServerFailed
from benchmarks.record import MachineRecord, now_text, results_file, save_json, this_machine
from models.common.options import JsonOption, with_options
from models.common.record import Record
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store

STEPS = {
    "one prompt of 110 tokens": [[0, 110]],
    "5 prompts of 100 tokens": [[seq, 100] for seq in range(5)],
    "one prompt of 32 tokens": [[0, 32]],
    "16 rows": [[seq, 1] for seq in range(16)],
    "1 row": [[0, 1]],
}
"""What a step computes: (sequence, tokens) of each part. Rows are computed behind prompts of 100 tokens."""


class PrefillSettings(Record):
    """The options of `deskside bench prefill`."""

    model: str = Field(default=DEFAULT_MODEL, description="A model's name, or a GGUF file.")
    repetitions: int = Field(default=15, ge=1, description="Times each step is computed, in turns.")
    threads: int | None = Field(default=None, ge=1, description="Threads (default: the server's).")
    out: Path | None = Field(default=None, description="JSON file (default: results/prefill-<time>.json).")


class PrefillRun(Record):
    """One run: raw seconds of each step, with llama.cpp's products and with our own."""

    schema_version: Literal[1] = 1
    started_at: str
    machine: MachineRecord
    backend: str
    threads: int
    model: str
    size_bytes: int
    repetitions: int
    seconds: dict[str, dict[str, list[float]]]


@with_options(settings=PrefillSettings)
def prefill_command(settings: PrefillSettings, as_json: JsonOption = False) -> None:
    """Measure prompts computed by llama.cpp's matrix products and by Deskside's own."""
    path = Path(settings.model)
    gguf = path if path.suffix == ".gguf" else Store().get(settings.model).gguf
    started = now_text()
    job = {"gguf": str(gguf), "steps": STEPS, "repetitions": settings.repetitions, "threads": settings.threads}
    run = PrefillRun(
        started_at=started,
        machine=this_machine(),
        model=gguf.name,
        size_bytes=gguf.stat().st_size,
        repetitions=settings.repetitions,
        **_timed(job),
    )
    out = settings.out or results_file("prefill")
    save_json(out, run.model_dump(mode="json"))
    print(f"raw seconds: {out}", file=sys.stderr)
    if as_json:
        print(json.dumps(run.model_dump(mode="json") | {"ratios": ratios(run)}, ensure_ascii=False, indent=2))
    else:
        print("\n".join(lines(run)))


def ratios(run: PrefillRun) -> dict[str, float]:
    """The speed of each step by our own products over that by llama.cpp's: medians."""
    return {name: median(took["stock"]) / median(took["own"]) for name, took in run.seconds.items()}


def lines(run: PrefillRun) -> list[str]:
    """The report, at most 80 columns wide."""
    found = [f"{ratio:5.2f} times as fast: {name}" for name, ratio in ratios(run).items()]
    return [
        *found,
        f"{run.model}, {run.repetitions} repetitions in turns, medians, {run.threads} threads",
        run.machine.cpu,
        run.backend,
    ]


def _timed(job: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prefill.race_child"]
    # As the server sets it: threads that spin for ever take the time of those that they wait for.
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or ["it gives no reason"]
        raise ServerFailed(f"the products could not be timed: {reason[0]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
