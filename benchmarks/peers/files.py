"""The model files of a comparison, made where they are missing: F16 and Q4_K_M of the fine-tune, and CTranslate2's.

The Q4_K_M one is the plain conversion of the same fine-tune, its vocabulary whole: what a user would serve elsewhere.

They lie in a store of their own under the comparison's folder, so the user's models are left as they are.
"""

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.errors import ServerFailed
from benchmarks.load.servers import deskside_command
from models.store.store import Store, StoredModel

from .servers import CHOSEN, ModelFile, script

RECIPE, BASE = "email-triage", "gemma-3-270m"
MADE = {"F16": (), "Q4_K_M": ("--whole-vocab",)}


@dataclass(frozen=True, slots=True)
class Files:
    """Every file that is served. `tuned` is the installed fine-tune: the one that all servers share."""

    tuned: ModelFile
    tuned_f16: ModelFile
    tuned_q4: ModelFile
    base: ModelFile
    ctranslate2: Path


def prepare_files(store: Store, folder: Path, peers_python: Path) -> Files:
    """Find or make the files. Raises ModelNotFound, BadManifest, or ServerFailed when a conversion fails."""
    tuned = replace(model_file(store.get(RECIPE)), title=CHOSEN)
    base = model_file(store.get(BASE), "base ")
    own = Store(folder / "home")
    made = {}
    for kind, options in MADE.items():
        # of another fine-tune, or of one that was cut otherwise, it would be another file
        name = f"{RECIPE}-{kind.lower()}-{tuned.sha256[:8]}"
        made[kind] = converted(own, name, "--quant", kind, *options)
    ctranslate2 = folder / f"ctranslate2-{tuned.sha256[:16]}"
    if not ctranslate2.exists():
        _run([str(peers_python), "-P", script("run_ctranslate2.py"), "convert", str(tuned.path), str(ctranslate2)], {})
    return Files(tuned, made["F16"], made["Q4_K_M"], base, ctranslate2)


def converted(store: Store, name: str, *options: str) -> ModelFile:
    """The recipe's model of that name, converted with these options where it is missing. Raises ServerFailed."""
    if name not in store.names():
        command = deskside_command("convert", RECIPE, *options, "--name", name)
        _run(command, {"DESKSIDE_HOME": str(store.home)})
    return model_file(store.get(name))


def model_file(stored: StoredModel, prefix: str = "") -> ModelFile:
    """The file that `deskside serve` loads of an installed model; `prefix` goes before its quantization as title.

    Raises ServerFailed when the manifest does not list the file.
    """
    for artefact in stored.manifest.artefacts if stored.manifest else ():
        if stored.folder / artefact.file == stored.gguf:
            kind = artefact.quantization
            return ModelFile(stored.gguf, stored.folder, kind, artefact.sha256, prefix + kind)
    raise ServerFailed(f"the manifest of {stored.name!r} does not list {stored.gguf.name!r}: install the model again")


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"{' '.join(command[:4])} … failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
