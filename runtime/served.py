"""A model, loaded and ready to answer: what server, batch and chat hold in their hands."""

from dataclasses import dataclass

from models.manifest import Manifest
from models.store import Store, StoredModel

from .config import RuntimeConfig, physical_cores
from .constrain import LlGuidance
from .constrain_protocol import Constrainer
from .engine import EngineOptions
from .engine_recipe import LlamaRecipe
from .llama import LoadOptions, load_tokenizer
from .llama_protocol import ModelInfo, TokenizerLike
from .prompt import Prompter
from .worker import Worker
from .worker_process import ProcessHost
from .worker_protocol import EngineRecipe


@dataclass(frozen=True)
class ServedModel:
    """One model under one name. Its worker is not started yet."""

    name: str
    manifest: Manifest | None
    worker: Worker
    prompter: Prompter
    tokenizer: TokenizerLike
    info: ModelInfo
    constrainer: Constrainer

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and the backend: a seed repeats its answer only under the same one."""
        artefact = self.manifest.artefacts[0].sha256[:12] if self.manifest and self.manifest.artefacts else self.name
        return f"deskside-{artefact}-{self.info.backend.split(' ', maxsplit=1)[0].lower()}"

    @property
    def quantization(self) -> str:
        """Of the weights, as the manifest says; else what the file says of itself."""
        if self.manifest and self.manifest.artefacts:
            return self.manifest.artefacts[0].quantization
        return self.info.description


def open_model(name_or_path: str, config: RuntimeConfig, store: Store | None = None) -> ServedModel:
    """Find a model in the store (or at a path) and load it. The caller starts and stops its worker.

    Raises ModelNotFound, BadManifest or LoadFailed.
    """
    return load_model((store or Store()).resolve(name_or_path), config)


def load_model(stored: StoredModel, config: RuntimeConfig) -> ServedModel:
    """Load a model that was found, in a process of its own. Raises LoadFailed.

    This process reads the vocabulary meanwhile, and never the weights.
    """
    # Slower than a token a second no engine is of use.
    host = ProcessHost(recipe_of(stored, config), stored.name, silence_s=600.0 + config.step_tokens)
    try:
        tokenizer = load_tokenizer(stored.gguf)
        info = host.await_loaded()
    except BaseException:  # an interrupt too must leave no process behind
        host.close()
        raise
    return ServedModel(
        name=stored.name,
        manifest=stored.manifest,
        worker=Worker(host, queue=config.queue, slots=config.slots),
        # Beyond the length it was trained on a model writes nonsense, however many cells the cache has.
        prompter=Prompter(tokenizer, info.chat_template, min(info.n_ctx, info.n_ctx_train or info.n_ctx)),
        tokenizer=tokenizer,
        constrainer=LlGuidance(tokenizer),
        info=info,
    )


def recipe_of(stored: StoredModel, config: RuntimeConfig) -> EngineRecipe:
    """What the engine for a model is made of."""
    options = EngineOptions(step_tokens=config.step_tokens, max_running=config.slots)
    load = LoadOptions(
        n_ctx=config.context,
        n_batch=config.step_tokens,
        n_seq_max=options.n_seq_max,
        n_threads=config.threads or physical_cores(),
        gpu_layers=config.gpu_layers,
    )
    return LlamaRecipe(stored.gguf, load, options)
