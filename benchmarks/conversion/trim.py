"""`deskside bench trim`: the default model with its vocabulary trimmed by its recipe and whole, timed in turn."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.errors import BadRecord, ServerFailed
from benchmarks.load.servers import RECIPE, ModelFile, converted, recipe_file
from benchmarks.record import MachineRecord, load_record, now_text, results_file, save_json, this_machine
from models.common.console import NamedProgress, page, show_progress
from models.common.machine import mebibytes
from models.common.options import JsonOption, ReportOption, with_options
from models.common.record import Record
from models.gguf.header import read_meta
from models.manifest import read_manifest
from models.quality import read_quality
from models.store.store import Store

MAX_SIZE, MIN_DECODE = 0.4, 1.8
# Sequences at once: one, and as many as a server has slots.
WIDTHS = (1, 16)


class TrimSettings(Record):
    """The options of `deskside bench trim`."""

    kinds: str = Field(
        default="Q8_0-attn-Q4_0,Q8_0,Q4_0,Q4_K_M", description="Quantizations, each measured trimmed and whole."
    )
    keep: int | None = Field(default=None, ge=1, description="Tokens to keep (default: the recipe's number).")
    repetitions: int = Field(default=5, ge=1, description="Times each file is measured, in turn.")
    threads: int | None = Field(default=None, ge=1, description="Threads (default: the server's).")
    as_stored: bool = Field(
        default=False, description="Compute with the weights as stored, not repacked, as on a processor without AMX."
    )
    folder: Path = Field(default=Path(".bench-trim"), description="Folder for the converted files.")
    out: Path | None = Field(default=None, description="JSON file (default: results/trim-<time>.json).")


class TrimFile(Record):
    """One file and its speeds, medians over the repetitions; `decode_tokens_per_s` by sequences at once."""

    kind: str
    trimmed: bool
    tokens: int
    size_bytes: int
    sha256: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]


class TrimRun(Record):
    """One run of `deskside bench trim`, measured on examples of `prompt_tokens` and `answer_tokens`."""

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
    """The trimmed file's figure over the whole file's, same quantization. `reached` is None without an aim."""

    name: str
    value: float
    reached: bool | None = None


@with_options(settings=TrimSettings)
def trim_command(settings: TrimSettings, as_json: JsonOption = False, report: ReportOption = None) -> None:
    """Measure what trimming the default model's vocabulary gains: file size, decode and prefill speed."""
    if report is not None:
        run = load_trim_run(report)
    else:
        out = settings.out or results_file("trim")
        with show_progress() as progress:
            run = compare_trimmed(settings, progress)
        save_json(out, run.model_dump(mode="json"))
        print(f"medians: {out}", file=sys.stderr)
    if as_json:
        shown = {trimmed.kind: [one.model_dump(mode="json") for one in found] for trimmed, _, found in ratios(run)}
        print(json.dumps(run.model_dump(mode="json") | {"ratios": shown}, ensure_ascii=False, indent=2))
    else:
        _print(run)


def compare_trimmed(settings: TrimSettings, progress: NamedProgress) -> TrimRun:
    """Make the missing files and time all of them. Raises ModelError; BenchError when a conversion or a timing fails.

    The sizes of prompt and answer are those that the recipe's own ladder was timed with.
    """
    shape = read_quality(recipe_file()).shape
    if shape is None:
        raise BadRecord(f"{str(recipe_file())!r}: the recipe's quality.json does not say what it was timed with")
    started = now_text()
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
        machine=this_machine(),
        backend=report["backend"],
        repetitions=settings.repetitions,
        prompt_tokens=shape.prompt_tokens,
        answer_tokens=shape.answer_tokens,
        as_stored=settings.as_stored,
        files=made,
    )


def ratios(run: TrimRun) -> Iterator[tuple[TrimFile, TrimFile, tuple[TrimRatio, ...]]]:
    """Yield (trimmed, whole, their ratios) of each quantization."""
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
    """Read a run's file. Raises BadRecord naming the file and the first wrong field."""
    return load_record(path, TrimRun, "is not a comparison of trimmed files")


def _files(settings: TrimSettings, progress: NamedProgress) -> dict[str, tuple[str, bool, ModelFile]]:
    """Name -> (quantization, trimmed or not, the file)."""
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
        # other files for a later version of the recipe
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
    # -P: a folder named `convert` in the working directory must not shadow ours
    command = [sys.executable, "-P", "-m", "convert.measure.speed"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"the files cannot be timed (exit {done.returncode}): {done.stderr.strip()[-800:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _print(run: TrimRun) -> None:
    machine, out = run.machine, page()
    weights = "; weights as they lie in the file, not repacked" if run.as_stored else ""
    for trimmed, whole, found in ratios(run):
        sizes = f"{mebibytes(trimmed.size_bytes)} of {mebibytes(whole.size_bytes)}"
        out.print(f"{trimmed.kind}: {trimmed.tokens} of {whole.tokens} tokens, {sizes}")
        for one in found:
            verdict = {None: "", True: ", aim reached", False: ", aim MISSED"}[one.reached]
            out.print(f"  {one.name}: {one.value:.3f} of the whole vocabulary's{verdict}")
    out.print(f"{machine.cpu}, {machine.logical_cores} cores, {machine.system}; {run.backend}{weights}")
    shape = f"{run.prompt_tokens} tokens of prompt"
    out.print(f"Medians of {run.repetitions} repetitions in turns, each file in a process of its own; {shape}.")
