"""The default model with its vocabulary trimmed, as its recipe does it, and whole: made if missing, timed in turns."""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.errors import BadRecord, ServerFailed
from benchmarks.load.model_file import RECIPE, ModelFile, converted, recipe_file
from benchmarks.record import MachineRecord, Record, describe, load_record, save_json
from models.common.console import NamedProgress, show_progress
from models.common.options import JsonOption, ReportOption, with_options
from models.gguf.header import read_meta
from models.manifest import read_manifest
from models.quality import read_quality
from models.store.store import Store

MAX_SIZE, MIN_DECODE = 0.4, 1.8
# One sequence, and as many as a server has slots.
WIDTHS = (1, 16)


class TrimSettings(Record):
    """What a comparison of the default model with its vocabulary trimmed and whole can be told."""

    kinds: str = Field(
        default="Q8_0-attn-Q4_0,Q8_0,Q4_0,Q4_K_M", description="Quantizations, each measured trimmed and whole."
    )
    keep: int | None = Field(default=None, ge=1, description="Tokens to keep (default: as many as the recipe does).")
    repetitions: int = Field(default=5, ge=1, description="Times each file is measured, in turns.")
    threads: int | None = Field(default=None, ge=1, description="Threads (default: as the server takes).")
    as_stored: bool = Field(
        default=False, description="Compute with weights as they lie in the file, as on a processor without AMX."
    )
    folder: Path = Field(default=Path(".bench-trim"), description="Where the files are made.")
    out: Path | None = Field(default=None, description="Where the JSON goes (default: results/trim-<time>.json).")


class TrimFile(Record):
    """One file and its speeds, medians over the repetitions; `decode_tokens_per_s` by sequences that write at once."""

    kind: str
    trimmed: bool
    tokens: int
    size_bytes: int
    sha256: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]


class TrimRun(Record):
    """One run of `deskside bench trim`. Speeds are of examples of `prompt_tokens` and `answer_tokens`."""

    schema_version: Literal[1] = 1
    started_at: str
    machine: MachineRecord
    backend: str
    repetitions: int
    prompt_tokens: int
    answer_tokens: int
    as_stored: bool = False
    files: tuple[TrimFile, ...] = ()


class TrimRatio(Record):
    """A figure of the trimmed file over the whole one's of the same quantization. No aim: None."""

    name: str
    value: float
    reached: bool | None = None


def ratios(run: TrimRun) -> Iterator[tuple[TrimFile, TrimFile, tuple[TrimRatio, ...]]]:
    """(trimmed, whole, its ratios) of each quantization."""
    for trimmed in (file for file in run.files if file.trimmed):
        whole = next(file for file in run.files if file.kind == trimmed.kind and not file.trimmed)
        size = trimmed.size_bytes / whole.size_bytes
        found = [TrimRatio(name="size", value=size, reached=size <= MAX_SIZE)]
        for width in WIDTHS:
            faster = trimmed.decode_tokens_per_s[width] / whole.decode_tokens_per_s[width]
            found.append(TrimRatio(name=f"decode ×{width}", value=faster, reached=faster >= MIN_DECODE))
        found.append(TrimRatio(name="prefill", value=trimmed.prefill_tokens_per_s / whole.prefill_tokens_per_s))
        yield trimmed, whole, tuple(found)


def load_trim_run(path: Path) -> TrimRun:
    """Read a run's file. Raises BadRecord naming the file and the first field that is wrong."""
    return load_record(path, TrimRun, "is not a comparison of trimmed files")


def compare_trimmed(settings: TrimSettings, progress: NamedProgress) -> TrimRun:
    """Make the files and measure them. Raises ModelError, and BenchError when a conversion or a measurement fails.

    The typical example is the one that the recipe's own ladder was timed with.
    """
    shape = read_quality(recipe_file()).shape
    if shape is None:
        raise BadRecord(f"{str(recipe_file())!r}: the recipe's quality.json does not say what it was timed with")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    files = _files(settings, progress)
    job = {
        "files": {name: str(file.path) for name, (_, _, file) in files.items()},
        "rounds": settings.repetitions,
        "threads": settings.threads,
        "repack": not settings.as_stored,
        "prompt_tokens": shape.prompt_tokens,
        "answer_tokens": shape.answer_tokens,
    }
    progress("time the files in turns", 0, 1)
    report = _timed(job)
    progress("time the files in turns", 1, 1)
    made = tuple(
        TrimFile(
            kind=kind,
            trimmed=trimmed,
            tokens=read_meta(file.path).n_vocab,
            size_bytes=file.path.stat().st_size,
            sha256=file.sha256,
            prefill_tokens_per_s=report["speeds"][name]["prefill_tokens_per_s"],
            decode_tokens_per_s=report["speeds"][name]["decode_tokens_per_s"],
        )
        for name, (kind, trimmed, file) in files.items()
    )
    return TrimRun(
        started_at=started,
        machine=describe(),
        backend=report["backend"],
        repetitions=settings.repetitions,
        prompt_tokens=shape.prompt_tokens,
        answer_tokens=shape.answer_tokens,
        as_stored=settings.as_stored,
        files=made,
    )


def _files(settings: TrimSettings, progress: NamedProgress) -> dict[str, tuple[str, bool, ModelFile]]:
    """Name -> (quantization, is it trimmed, the file)."""
    recipe = read_manifest(recipe_file())
    if recipe.adapter is None or recipe.conversion is None or not recipe.conversion.trim:
        raise BadRecord(f"{str(recipe_file())!r}: the recipe does not trim its vocabulary: there is nothing to compare")
    own = Store(settings.folder.absolute() / "home")
    keep = settings.keep or recipe.conversion.keep
    texts = str(recipe_file(recipe.conversion.trim))
    kinds = [kind.strip() for kind in settings.kinds.split(",")]
    wanted = [(kind, trimmed) for kind in kinds for trimmed in (True, False)]
    files = {}
    for done, (kind, trimmed) in enumerate(wanted):
        progress("make the files", done, len(wanted))
        # a later recipe's files are others
        name = f"{RECIPE}-{(recipe.adapter.sha256 or '')[:8]}-{kind.lower()}"
        if not trimmed:
            file = converted(own, f"{name}-whole", "--quant", kind, "--whole-vocab")
        elif (kind.lower(), keep) == (recipe.conversion.quantization.lower(), recipe.conversion.keep):
            file = converted(own, f"{name}-recipe-{keep}")  # the one that is served, rounded by the recipe's matrix
        else:
            file = converted(own, f"{name}-{keep}", "--quant", kind, "--trim-vocab", texts, "--keep", str(keep))
        files[f"{file.quantization}, {'trimmed' if trimmed else 'whole'}"] = (file.quantization, trimmed, file)
    progress("make the files", len(wanted), len(wanted))
    return files


def _timed(job: dict[str, object]) -> dict[str, Any]:
    # -P: a folder called `convert` where the user stands must not be taken for ours
    command = [sys.executable, "-P", "-m", "convert.measure.speed"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"the files cannot be timed (exit {done.returncode}): {done.stderr.strip()[-800:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@with_options(settings=TrimSettings)
def trim_command(settings: TrimSettings, as_json: JsonOption = False, report: ReportOption = None) -> None:
    """Measure what trimming the default model's vocabulary gains: file size, decode and prefill speed."""
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
