"""The checkpoints that the oracle converts: every family, as small as its architecture allows. Data only, no torch.

The configurations have the form of published ones: most as transformers 4 wrote them (`rope_theta`, `rope_scaling`,
`torch_dtype`), some as transformers 5 does (`rope_parameters`, `dtype`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
}
_GEMMA: Mapping[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_LONGROPE_ORIGINAL = 256


@dataclass(frozen=True)
class Case:
    """One checkpoint. `lengths`: how many tokens' logits are compared, in a context that just holds them.

    `rows` is the height of the embedding where it is larger than the vocabulary. `converter` is False where llama.cpp's
    own converter fails; its logits are compared all the same. `said` changes config.json once the weights are saved.
    """

    name: str
    architecture: str
    vocabulary: str
    config: Mapping[str, Any]
    dtype: str = "bfloat16"
    shards: int = 1
    rows: int | None = None
    lengths: tuple[int, ...] = (40,)
    converter: bool = True
    generation: Mapping[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)


def _longrope(dimensions: int) -> dict[str, Any]:
    half = dimensions // 2
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.05 * index for index in range(half)],
        "long_factor": [1.0 + 0.9 * index for index in range(half)],
    }


CASES = (
    Case(
        "llama-2",
        "LlamaForCausalLM",
        "llama-spm",
        {**_SMALL, "model_type": "llama", "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2},
        dtype="float16",
    ),
    Case(
        "llama-3.2",
        "LlamaForCausalLM",
        "llama-3",
        {
            **_SMALL,
            "model_type": "llama",
            "head_dim": 16,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "eos_token_id": [451, 454, 455],
        },
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [451, 454, 455]},
    ),
    Case(
        "smollm2",
        "LlamaForCausalLM",
        "smollm",
        {**_SMALL, "model_type": "llama", "rope_theta": 100000, "tie_word_embeddings": True},
    ),
    Case(
        "tinyllama-sharded",
        "LlamaForCausalLM",
        "llama-spm",
        {**_SMALL, "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0},
        dtype="float32",
        shards=3,
    ),
    Case(
        "llama-json-only",
        "LlamaForCausalLM",
        "llama-spm-json",
        {**_SMALL, "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
    ),
    Case(
        "llama-model-only",
        "LlamaForCausalLM",
        "llama-spm-model",
        {**_SMALL, "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
    ),
    Case(
        "llama-biased",
        "LlamaForCausalLM",
        "llama-3",
        {**_SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "rope_theta": 10000.0},
    ),
    Case(
        "llama-linear",
        "LlamaForCausalLM",
        "llama-spm",
        {
            **_SMALL,
            "model_type": "llama",
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        dtype="float16",
    ),
    Case(
        "llama-yarn",
        "LlamaForCausalLM",
        "llama-3",
        {
            **_SMALL,
            "model_type": "llama",
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 32.0,  # llama.cpp reads neither of the two here: these are what it has
                "beta_slow": 1.0,
            },
        },
        dtype="float32",
        lengths=(40, 300),
    ),
    Case(
        "mistral",  # llama.cpp's llama graph has no sliding window: it is compared within the first one
        "MistralForCausalLM",
        "mistral-spm",
        {
            **_SMALL,
            "model_type": "mistral",
            "sliding_window": 48,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Case(
        "mistral-v5",
        "MistralForCausalLM",
        "mistral-spm",
        {
            **_SMALL,
            "model_type": "mistral",
            "sliding_window": None,
            "head_dim": 32,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Case(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            **_SMALL,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
        },
        rows=512,
        generation={
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 20,
            "repetition_penalty": 1.1,
            "eos_token_id": [459, 457],
        },
    ),
    Case(
        "qwen2-yarn",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            **_SMALL,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 256, "type": "yarn"},
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        },
        dtype="float16",
        lengths=(40, 300),
    ),
    Case(
        "qwen2-head-apart",  # as merging tools leave it: a head of its own, and a config that says it has none
        "Qwen2ForCausalLM",
        "qwen2",
        {**_SMALL, "model_type": "qwen2", "rope_theta": 1000000.0, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
        said={"tie_word_embeddings": True},
        converter=False,
    ),
    Case(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        {
            **_SMALL,
            "model_type": "qwen3",
            "head_dim": 32,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
        },
        rows=512,
    ),
    Case(
        "qwen3-v5",
        "Qwen3ForCausalLM",
        "qwen3",
        {
            **_SMALL,
            "model_type": "qwen3",
            "head_dim": 16,
            "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
            "layer_types": ["full_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        shards=2,
    ),
    Case(
        "gemma-2",
        "Gemma2ForCausalLM",
        "gemma",
        {
            **_SMALL,
            **_GEMMA,
            "model_type": "gemma2",
            "num_hidden_layers": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "rope_theta": 10000.0,
        },
    ),
    Case(
        "gemma-3",
        "Gemma3ForCausalLM",
        "gemma",
        {
            **_SMALL,
            **_GEMMA,
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "num_key_value_heads": 1,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "eos_token_id": [1, 6],
        },
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
    Case(
        "gemma-3-v5",
        "Gemma3ForCausalLM",
        "gemma",
        {
            **_SMALL,
            **_GEMMA,
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        dtype="float32",
    ),
    Case(
        "phi-3",
        "Phi3ForCausalLM",
        "phi-3",
        {
            **_SMALL,
            "model_type": "phi3",
            "num_key_value_heads": 4,
            "original_max_position_embeddings": _LONGROPE_ORIGINAL,
            "rope_theta": 10000.0,
            "rope_scaling": _longrope(16),
            "sliding_window": 2047,
            "bos_token_id": 1,
            "eos_token_id": 544,
            "pad_token_id": 544,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
        rows=576,
        lengths=(40, 300),
    ),
    Case(
        "phi-3-4k",
        "Phi3ForCausalLM",
        "phi-3",
        {
            **_SMALL,
            "model_type": "phi3",
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 1024,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "sliding_window": 2047,
            "bos_token_id": 1,
            "eos_token_id": 544,
            "pad_token_id": 544,
            "tie_word_embeddings": False,
        },
        dtype="float16",
        rows=576,
    ),
    Case(
        "phi-4-mini",
        "Phi3ForCausalLM",
        "phi-4-mini",
        {
            **_SMALL,
            "model_type": "phi3",
            "original_max_position_embeddings": _LONGROPE_ORIGINAL,
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "rope_scaling": _longrope(12),
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        rows=512,
        lengths=(40, 300),
    ),
    Case(
        "granite-3",
        "GraniteForCausalLM",
        "granite",
        {
            **_SMALL,
            "model_type": "granite",
            "attention_multiplier": 0.0625,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "rope_theta": 10000000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "olmo-2",
        "Olmo2ForCausalLM",
        "olmo-2",
        {
            **_SMALL,
            "model_type": "olmo2",
            "rope_theta": 500000,
            "rope_scaling": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
        },
    ),
    Case(
        "stablelm-2",
        "StableLmForCausalLM",
        "stablelm-2",
        {
            **{key: value for key, value in _SMALL.items() if key != "rms_norm_eps"},
            "model_type": "stablelm",
            "num_key_value_heads": 4,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "use_qkv_bias": True,
            "tie_word_embeddings": False,
        },
        dtype="float16",
    ),
    Case(
        "stablelm-2-12b",
        "StableLmForCausalLM",
        "stablelm-2",
        {
            **{key: value for key, value in _SMALL.items() if key != "rms_norm_eps"},
            "model_type": "stablelm",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000,
            "use_qkv_bias": False,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        converter=False,  # it loses the heads' norms: `return self._stack_qk_norm(...)` within a generator
    ),
)
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class AdapterCase:
    """An adapter by PEFT on the checkpoint of case `base`; `config` is a LoraConfig."""

    name: str
    base: str
    config: Mapping[str, Any]


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LINEAR = [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]
ADAPTERS = (
    AdapterCase("lora", "llama-3.2", {"r": 4, "lora_alpha": 8, "target_modules": _LINEAR}),
    AdapterCase("rslora", "qwen2", {"r": 4, "lora_alpha": 8, "target_modules": _LINEAR, "use_rslora": True}),
    AdapterCase("dora", "llama-2", {"r": 4, "lora_alpha": 4, "target_modules": _LINEAR, "use_dora": True}),
    AdapterCase("dora-gemma", "gemma-3", {"r": 2, "lora_alpha": 4, "target_modules": _LINEAR, "use_dora": True}),
    AdapterCase(
        "patterns",
        "qwen3",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": _LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"k_proj": 1, r"layers\.0\.mlp\.up_proj": 16},
        },
    ),
    AdapterCase(
        "saved-modules",
        "tinyllama-sharded",
        {"r": 4, "lora_alpha": 8, "target_modules": _ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    AdapterCase(
        "saved-norms",
        "gemma-3",
        {"r": 4, "lora_alpha": 8, "target_modules": _ATTENTION, "modules_to_save": ["input_layernorm", "q_norm"]},
    ),
    AdapterCase(
        "fused",
        "phi-3",
        {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    ),
    AdapterCase("granite", "granite-3", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    AdapterCase("olmo", "olmo-2", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True}),
    AdapterCase("stablelm", "stablelm-2", {"r": 4, "lora_alpha": 8, "target_modules": _LINEAR, "use_dora": True}),
    AdapterCase("mistral", "mistral", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
)
