"""A model, loaded and ready to answer, for server, batch and chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from models.common.machine import physical_cores
from models.manifest import BARE_PROMPT, Manifest
from models.store.store import Store, StoredModel
from runtime.config import RuntimeConfig
from runtime.decoding.grammar import Grammars
from runtime.engine.options import EngineOptions, snapshot_bytes
from runtime.llama.interface import LoadOptions, ModelInfo, TokenizerLike
from runtime.llama.model import load_tokenizer
from runtime.openai.confidence import PromisedLabels
from runtime.prompt.cut import CutMessages, cut_messages
from runtime.prompt.prompter import Prompter
from runtime.worker.messages import EngineRecipe
from runtime.worker.process import EngineProcess
from runtime.worker.supervisor import EngineSupervisor, SupervisorLimits

from .names import ModelRef, find, require_weights
from .promise import promised_labels
from .recipe import LlamaRecipe, PrefixFolder


@dataclass(frozen=True)
class ServedModel:
    """One model under one name. Its engine runs until `supervisor.stop()`.

    With an adapter, `adapter` is the name its requests carry, `manifest` is the adapter's own and `base` that of the
    weights; supervisor, tokenizer and grammars are shared by all models served from the same base. `fast` is the
    engine's mode, `target` the share of automatic answers that must be right (None: the model's own).
    """

    name: str
    manifest: Manifest | None
    supervisor: EngineSupervisor
    prompter: Prompter
    tokenizer: TokenizerLike
    info: ModelInfo
    grammars: Grammars
    adapter: str | None = None
    base: Manifest | None = None
    fast: bool = False
    target: float | None = None

    @cached_property
    def promise(self) -> PromisedLabels | None:
        """The promise of the model's labels, if it is calibrated."""
        if self.manifest is None or self.manifest.calibration is None:
            return None
        return promised_labels(self.manifest, self.target)

    @cached_property
    def label_tokens(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each label; none unless they all differ."""
        labels = self.manifest.labels if self.manifest is not None else ()
        encode = self.tokenizer.encode
        tokens = tuple(tuple(encode(label, add_special=False, parse_special=False)) for label in labels)
        return tokens if len(set(tokens)) == len(tokens) and () not in tokens else ()

    @property
    def fingerprint(self) -> str:
        """An identifier of weights, backend and mode: a seed repeats its answer only under the same one."""
        weights = [made.artefacts[0].sha256[:12] for made in (self.base, self.manifest) if made and made.artefacts]
        backend = self.info.backend.split(" ", maxsplit=1)[0].lower()
        mode = ["fast"] if self.fast else []
        return "-".join(["deskside", *(weights or [self.name]), backend, *mode])

    def cut(self, messages: Sequence[Mapping[str, object]]) -> CutMessages:
        """The messages, each of the user's cut to the length that the model was trained on, if it has one."""
        prompt = self.manifest.prompt if self.manifest is not None else BARE_PROMPT
        return cut_messages(messages, prompt, self.tokenizer) if prompt.max_text_tokens else CutMessages(messages)

    @property
    def quantization(self) -> str:
        """The quantization of the weights by the manifest; without one, the file's description of itself."""
        weights = self.manifest if self.adapter is None else self.base
        if weights and weights.artefacts:
            return weights.artefacts[0].quantization
        return self.info.description


def open_model(name_or_path: str, config: RuntimeConfig, store: Store | None = None) -> ServedModel:
    """Find a model in the store, at a path, or as BASE:ADAPTER, and load it. The caller stops its supervisor.

    Raises what `find` raises, LoadFailed or TemplateFailed.
    """
    wanted = find(name_or_path, store or Store())
    loaded = load_model(wanted.base, config, wanted.adapters)
    try:
        return under_name(wanted, loaded)
    except BaseException:
        loaded.supervisor.stop()
        raise


def under_name(wanted: ModelRef, loaded: ServedModel) -> ServedModel:
    """The loaded base under the name of `wanted`. Raises TemplateFailed if the adapter's template does not parse."""
    if wanted.adapter is None:
        return loaded
    prompter, info = loaded.prompter, loaded.info
    if wanted.template is not None:
        info = replace(info, chat_template=wanted.template)
        prompter = Prompter(loaded.tokenizer, wanted.template, prompter.n_ctx)
    return replace(
        loaded,
        name=wanted.id,
        manifest=wanted.adapter.manifest,
        prompter=prompter,
        info=info,
        adapter=wanted.adapter.name,
        base=loaded.manifest,
    )


def load_model(stored: StoredModel, config: RuntimeConfig, adapters: Mapping[str, Path] | None = None) -> ServedModel:
    """Load a model and its LoRA adapters (name -> GGUF file) in an engine process, which then takes requests.

    Meanwhile this process reads the vocabulary; it never reads the weights. Blocks. Raises LoadFailed or
    TemplateFailed.
    """
    require_weights(stored)
    # An engine silent this long is hung: ten minutes, plus one second for each token of a step.
    silence_s = 600.0 + config.step_tokens
    process = EngineProcess(recipe_of(stored, config, adapters or {}), stored.name, silence_s=silence_s)
    supervisor = EngineSupervisor(process, limits=SupervisorLimits(slots=config.slots, queue=config.queue))
    try:
        supervisor.launch()
        tokenizer = load_tokenizer(stored.gguf)
        info = supervisor.start()
        # Beyond its trained length a model writes nonsense, even if the KV cache is larger.
        prompter = Prompter(tokenizer, info.chat_template, min(info.n_ctx, info.n_ctx_train or info.n_ctx))
        grammars = Grammars(tokenizer)
        return ServedModel(
            name=stored.name,
            manifest=stored.manifest,
            supervisor=supervisor,
            prompter=prompter,
            tokenizer=tokenizer,
            info=info,
            grammars=grammars,
            fast=config.fast,
            target=config.target,
        )
    except BaseException:  # an interrupt too must leave no process behind
        supervisor.stop()
        raise


def recipe_of(stored: StoredModel, config: RuntimeConfig, adapters: Mapping[str, Path]) -> EngineRecipe:
    """The recipe of the engine for a model."""
    options = EngineOptions(
        step_tokens=config.step_tokens,
        max_running=config.slots,
        max_drafts=config.speculate,
        fast=config.fast,
        snapshot_bytes=snapshot_bytes(config.prefix_memory, config.memory_budget),
    )
    load = LoadOptions(
        n_ctx=config.context,
        n_batch=config.step_tokens,
        n_seq_max=options.max_running,
        n_outputs=options.n_outputs,
        n_threads=config.threads or physical_cores(),
        gpu_layers=config.gpu_layers,
        long_prompts=config.long_prompts,
        adapters=adapters,
        prefill=config.prefill,
        streams=True,
        exact=not config.fast,
    )
    prefixes = None
    if config.prefix_disk is not None:
        prefixes = PrefixFolder(config.prefix_disk, int(config.prefix_disk_size * 2**30), stored.name)
    return LlamaRecipe(stored.gguf, load, options, prefixes)
