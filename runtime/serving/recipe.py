"""The recipe of a real engine: one value that can travel to the process that builds it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from models.common.files import default_home
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.handle import library_release
from runtime.llama.interface import LoadOptions, ModelInfo
from runtime.llama.model import load
from runtime.prefixes.disk import DiskStore
from runtime.prefixes.identity import FileHashes, Identity

_log = logging.getLogger("deskside.prefixes")


@dataclass(frozen=True, slots=True)
class PrefixFolder:
    """A folder for prefixes that outlive the engine of `model`, and the most bytes of all files in it."""

    root: Path
    max_bytes: int
    model: str

    def open(self, gguf: Path, load: LoadOptions, info: ModelInfo) -> DiskStore | None:
        """The store of what this engine computes; None, with a line in the log, if a file cannot be read."""
        hashes = FileHashes(default_home() / "hashes")
        try:
            sha256, adapters = hashes.sha256(gguf), {name: hashes.sha256(path) for name, path in load.adapters.items()}
        except OSError as error:
            _log.warning("prefixes of %r are not kept on disk: %s", self.model, error)
            return None
        computing = f"{info.backend}, {'the same bits every time' if load.exact else 'fast'}"
        if load.long_prompts:
            computing += ", rotations for long prompts"
        return DiskStore(
            self.root, Identity(self.model, sha256, library_release(), computing), self.max_bytes, adapters
        )


@dataclass(frozen=True, slots=True)
class LlamaRecipe:
    """A GGUF file, how to load it, the engine's bounds, and a folder for prefixes, if any. An `EngineRecipe`."""

    gguf: Path
    load: LoadOptions
    engine: EngineOptions
    prefixes: PrefixFolder | None = None

    def build(self) -> tuple[Engine, ModelInfo]:
        """Load the model. Raises LoadFailed."""
        llama = load(self.gguf, self.load)
        disk = None if self.prefixes is None else self.prefixes.open(self.gguf, self.load, llama.info)
        return Engine(llama, self.engine, Grammars(llama.tokenizer), disk=disk), llama.info
