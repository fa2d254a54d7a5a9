"""The default model with its vocabulary trimmed, as its recipe does it, and whole: made if missing, timed in turns."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

from models.gguf.header import read_meta
from models.manifest import read_manifest
from models.quality import read_quality
from models.store.store import Store

from .console import Progress
from .errors import BadRecord, ServerFailed
from .machine import describe
from .peer_files import RECIPE, converted
from .peer_servers import ModelFile
from .plan import recipe_file
from .trim_record import TrimFile, TrimRun, TrimSettings


def compare_trimmed(settings: TrimSettings, progress: Progress) -> TrimRun:
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


def _files(settings: TrimSettings, progress: Progress) -> dict[str, tuple[str, bool, ModelFile]]:
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
