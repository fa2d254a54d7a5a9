"""Tiny Hugging Face folders of every family, made with numpy only: names and shapes as transformers saves them.

Every number comes from a counter, so that the bytes are the same everywhere and hashes can be golden. Weights are not
multiples of a power of two: the comparisons include rounding to half precision.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint.folder import HfCheckpoint
from convert.tokenizer.read import VocabularyFields
from models.gguf.fields import Field

from .tiny import grid, safetensors_bytes

N_EMBD, N_FF, N_LAYERS, N_HEADS, N_KV_HEADS, HEAD_DIM, N_VOCAB = 64, 96, 2, 4, 2, 16, 72
_SIZES: Mapping[str, Any] = {
    "hidden_size": N_EMBD,
    "intermediate_size": N_FF,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
_GEMMA: Mapping[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 16,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * index for index in range(6)],
    "long_factor": [1.0 + 0.9 * index for index in range(6)],
}
CLASSES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rope_theta": 500_000.0, "rope_scaling": _LLAMA3, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 32, "sliding_window": None, "rope_theta": 1e6},
    "qwen2": {"rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "gemma2": _GEMMA,
    "gemma3": {**_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 10_000.0},
    "phi3": {
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
        "rope_scaling": _LONGROPE,
        "sliding_window": 262_144,
    },
    "granite": {
        "attention_multiplier": 0.0625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "rope_theta": 1e7,
        "tie_word_embeddings": True,
    },
    "olmo2": {"rope_theta": 500_000},
    "stablelm": {"layer_norm_eps": 1e-5, "qk_layernorm": True, "use_qkv_bias": True},
}
TIED = {"llama", "qwen2", "gemma2", "gemma3", "granite"}
# bfloat16 as most are published, and the other two types.
DTYPES: Mapping[str, str] = {"mistral": "F16", "olmo2": "F32", "stablelm": "F16"}


def no_vocabulary(folder: Path, config: Mapping[str, Any], n_rows: int) -> VocabularyFields:
    """Stand in for `convert.tokenizer.read.read_vocabulary`: one field, which only the vocabulary's reader sets."""
    return VocabularyFields({"tokenizer.ggml.model": Field.string(f"{n_rows} rows")}, n_rows, ())


def open_tiny(folder: Path) -> HfCheckpoint:
    """Open a folder that has no tokenizer."""
    return HfCheckpoint(folder, no_vocabulary)


def config(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a family; `changes` override it."""
    return {**_SIZES, "architectures": [CLASSES[family]], **CONFIGS[family], **changes}


def shapes(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the tensors that transformers saves."""
    yield "model.embed_tokens.weight", (N_VOCAB, N_EMBD)
    yield "model.norm.weight", (N_EMBD,)
    if family == "stablelm":
        yield "model.norm.bias", (N_EMBD,)
    if family not in TIED:
        yield "lm_head.weight", (N_VOCAB, N_EMBD)
    for layer in range(N_LAYERS):
        for name, shape in (*_attention(family), *_mlp(family), *_norms(family)):
            yield f"model.layers.{layer}.{name}", shape


def _attention(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    head = int(CONFIGS[family].get("head_dim", HEAD_DIM))
    n_q, n_kv = N_HEADS * head, N_KV_HEADS * head
    yield "self_attn.o_proj.weight", (N_EMBD, n_q)
    if family == "phi3":
        yield "self_attn.qkv_proj.weight", (n_q + 2 * n_kv, N_EMBD)
        return
    for name, width in (("q", n_q), ("k", n_kv), ("v", n_kv)):
        yield f"self_attn.{name}_proj.weight", (width, N_EMBD)
        if family in {"llama", "qwen2", "stablelm"}:
            yield f"self_attn.{name}_proj.bias", (width,)
    if family == "llama":
        yield "self_attn.o_proj.bias", (N_EMBD,)
    if family in {"qwen3", "gemma3"}:
        yield from ((f"self_attn.{name}_norm.weight", (head,)) for name in "qk")
    if family == "olmo2":
        yield from (("self_attn.q_norm.weight", (n_q,)), ("self_attn.k_norm.weight", (n_kv,)))
    if family == "stablelm":
        for name, heads in (("q", N_HEADS), ("k", N_KV_HEADS)):
            yield from ((f"self_attn.{name}_layernorm.norms.{at}.weight", (head,)) for at in range(heads))


def _mlp(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "mlp.down_proj.weight", (N_EMBD, N_FF)
    if family == "phi3":
        yield "mlp.gate_up_proj.weight", (2 * N_FF, N_EMBD)
        return
    yield from ((f"mlp.{name}_proj.weight", (N_FF, N_EMBD)) for name in ("gate", "up"))


def _norms(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = ["post_attention_layernorm"]
    if family != "olmo2":
        names.append("input_layernorm")
    if family in {"gemma2", "gemma3", "olmo2"}:
        names.append("post_feedforward_layernorm")
    if family in {"gemma2", "gemma3"}:
        names.append("pre_feedforward_layernorm")
    for name in names:
        yield f"{name}.weight", (N_EMBD,)
        if family == "stablelm":
            yield f"{name}.bias", (N_EMBD,)


def weights(family: str) -> dict[str, np.ndarray]:
    """Tensor name -> float32; no two tensors alike."""
    return {name: grid(shape, 1 + index, span=500, unit=1000) for index, (name, shape) in enumerate(shapes(family))}


def write_folder(
    folder: Path,
    family: str = "llama",
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str | None = None,
    **changes: Any,
) -> Path:
    """Write a folder with one weight file; `changes` override config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(family, **changes)))
    arrays = weights(family) if tensors is None else tensors
    written = safetensors_bytes(arrays, dtype or DTYPES.get(family, "BF16"))
    (folder / "model.safetensors").write_bytes(written)
    return folder


def write_shards(folder: Path, family: str = "llama") -> Path:
    """The same weights in two files with an index."""
    write_folder(folder, family)
    (folder / "model.safetensors").unlink()
    arrays = weights(family)
    weight_map: dict[str, str] = {}
    for at in range(2):
        part = {name: array for index, (name, array) in enumerate(arrays.items()) if index % 2 == at}
        name = f"model-0000{at + 1}-of-00002.safetensors"
        (folder / name).write_bytes(safetensors_bytes(part, DTYPES.get(family, "BF16")))
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
