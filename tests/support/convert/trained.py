"""Tiny models of every trained family that llama.cpp loads, and the same logits by the engine and by the trainer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.checkpoint.folder import HfCheckpoint
from convert.checkpoint.source import open_checkpoint
from convert.lora.adapter import PeftAdapter, read_adapter
from convert.tokenizer.read import VocabularyFields
from convert.training.base import GROUPS, DecoderWeights, read_weights, write_model
from convert.training.examples import NO_TARGETS, BatchShape, TokenBatch, TokenRow
from convert.training.settings import FinetuneSettings
from models.common.console import LineReporter
from models.gguf.fields import Field
from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import load
from tests.support.convert.hf_tiny import write_folder


def tiny_vocabulary(folder: Path, config: Mapping[str, Any], n_rows: int) -> VocabularyFields:
    """As many tokens as the tiny folders have rows, which llama.cpp can load; no text is tokenised with them."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"t{at}".encode() for at in range(n_rows - 3))]
    fields = {
        "tokenizer.ggml.model": Field.string("llama"),
        "tokenizer.ggml.pre": Field.string("default"),
        "tokenizer.ggml.tokens": Field.string_array(tokens),
        "tokenizer.ggml.scores": Field.float32_array([0.0] * n_rows),
        "tokenizer.ggml.token_type": Field.int32_array([2, 3, 3, *[1] * (n_rows - 3)]),
        "tokenizer.ggml.bos_token_id": Field.uint32(1),
        "tokenizer.ggml.eos_token_id": Field.uint32(2),
        "tokenizer.ggml.unknown_token_id": Field.uint32(0),
    }
    return VocabularyFields(fields, n_rows, ())


def tiny_gguf(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny model of the family as an F16 GGUF."""
    checkpoint = HfCheckpoint(write_folder(folder / family, family, **changes), tiny_vocabulary)
    target = folder / f"{family}.gguf"
    write_model(checkpoint, target, "write", LineReporter())
    checkpoint.close()
    return target


def weights_of(path: Path) -> DecoderWeights:
    checkpoint = open_checkpoint(path)
    try:
        return read_weights(checkpoint)
    finally:
        checkpoint.close()


def engine_logits(path: Path, tokens: np.ndarray, n_last: int) -> np.ndarray:
    """The logits of the last tokens by llama.cpp."""
    n = len(tokens)
    llama = load(path, LoadOptions(n_ctx=max(512, n), n_batch=max(512, n), n_threads=2))
    try:
        places = np.arange(n, dtype=np.int32)
        batch = Batch(tokens.astype(np.int32), places, np.zeros(n, np.int32), places >= n - n_last)
        return np.array(llama.decode(batch))
    finally:
        llama.close()


def jax_logits(
    path: Path, tokens: np.ndarray, n_last: int, *, n_trained: int = 1, adapter: Path | None = None
) -> np.ndarray:
    """The same by the decoder, in a batch with an empty row, and with columns before the text's beginning.

    `adapter` is a PEFT folder with all projections of all layers, which is added module by module.
    """
    padding = 3
    pytest.importorskip("jax", reason="needs the extra `finetune`")
    from convert.training.steps import DecoderSteps

    weights = weights_of(path)
    if adapter is not None:
        weights = _adapted(weights, read_adapter(adapter))
    steps = DecoderSteps(weights, FinetuneSettings(), n_trained)
    row = TokenRow(tokens, NO_TARGETS)
    batch = TokenBatch(BatchShape(2, len(tokens) + padding, n_last), (0,))
    x = np.zeros((2, batch.shape.width, weights.shape.n_embd), np.float32)
    x[0, padding:] = steps.embed(tokens)
    places = steps.places([row], batch)
    found: np.ndarray = steps.logits(steps.initial(), steps.freeze(x, places), places, n_last)[0]
    return found


def _adapted(weights: DecoderWeights, adapter: PeftAdapter) -> DecoderWeights:
    """The weights with the adapter's changes added, in Hugging Face's order of rows."""
    layers = []
    for number, layer in enumerate(weights.layers):
        changed = dict(layer)
        for group, parts in GROUPS.items():
            loras = [adapter.loras[f"model.layers.{number}.{module}"] for module in parts.values()]
            changed[group] = layer[group] + np.concatenate([one.scale * one.b @ one.a for one in loras])
        layers.append(changed)
    return replace(weights, layers=tuple(layers))
