"""The recipe of a real engine: one value that can travel to the process that builds it."""

from dataclasses import dataclass
from pathlib import Path

from runtime.decoding.grammar import Grammars
from runtime.llama.interface import ModelInfo
from runtime.llama.model import LoadOptions, load

from .engine import Engine
from .options import EngineOptions


@dataclass(frozen=True, slots=True)
class LlamaRecipe:
    """A GGUF file, how to load it, and the engine's bounds. An `EngineRecipe`."""

    gguf: Path
    load: LoadOptions
    engine: EngineOptions

    def build(self) -> tuple[Engine, ModelInfo]:
        """Load the model. Raises LoadFailed."""
        llama = load(self.gguf, self.load)
        return Engine(llama, self.engine, Grammars(llama.tokenizer)), llama.info
