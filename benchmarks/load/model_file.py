"""The model files that a benchmark serves: those of the default model's recipe, converted when missing."""

import os
import subprocess
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from benchmarks.errors import ServerFailed
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store, StoredModel

from .servers import deskside_command

RECIPE, BASE = DEFAULT_MODEL, "gemma-3-270m"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file to serve, its model's folder (with the manifest), and its facts.

    `title` names it among the files of a comparison; empty: its quantization does.
    """

    path: Path
    folder: Path
    quantization: str
    sha256: str
    title: str = ""


def recipe_file(*parts: str) -> Path:
    """A file of the default model's folder in the `models` package."""
    return Path(str(resources.files("models"))).joinpath("email_triage", *parts)


def converted(store: Store, name: str, *options: str) -> ModelFile:
    """The store's model `name`, converted from the recipe with `options` when missing. Raises ServerFailed."""
    if name not in store.names():
        command = deskside_command("convert", RECIPE, *options, "--name", name)
        run_to_end(command, {"DESKSIDE_HOME": str(store.home)})
    return model_file(store.get(name))


def model_file(stored: StoredModel, prefix: str = "") -> ModelFile:
    """The file that `deskside serve` loads for an installed model, titled `prefix` + quantization.

    Raises ServerFailed when the manifest does not list the file.
    """
    for artefact in stored.manifest.artefacts if stored.manifest else ():
        if stored.folder / artefact.file == stored.gguf:
            kind = artefact.quantization
            return ModelFile(stored.gguf, stored.folder, kind, artefact.sha256, prefix + kind)
    raise ServerFailed(f"the manifest of {stored.name!r} does not list {stored.gguf.name!r}: install the model again")


def run_to_end(command: list[str], environment: dict[str, str]) -> None:
    """Run `command` with these variables added. Raises ServerFailed with the end of its stderr when it fails."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"{' '.join(command[:4])} … failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
