"""Llama 2 and 3.x, SmolLM2, TinyLlama; Mistral and Granite, which vary their layout.

Mistral may have a sliding window, which llama.cpp ignores. Granite scales embedding, attention, residuals and logits.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from models.gguf.fields import Field

from .base import ATTENTION, MLP, Family, window_warning
from .config import Config
from .rope import llama3_factors

_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


class LlamaFamily(Family):
    """`LlamaForCausalLM`."""

    architecture = "llama"
    permutes_qk = True
    rope_kinds = ("default", "linear", "yarn", "llama3")
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
    }

    def fields(self, config: Config) -> dict[str, Field]:
        """Add the size of the vocabulary, and the rotated part of a head: all of it."""
        sizes = self.sizes(config)
        return {
            **super().fields(config),
            "vocab_size": Field.uint32(sizes.n_vocab),
            "rope.dimension_count": Field.uint32(sizes.head_dim),
        }

    def head_fields(self, config: Config) -> dict[str, Field]:
        """The width of a head, also where config.json omits it: transformers derives it."""
        width = Field.uint32(self.sizes(config).head_dim)
        return {"attention.key_length": width, "attention.value_length": width}

    def extras(self, config: Config) -> dict[str, np.ndarray]:
        """The divisors of Llama 3.1's stretched frequencies."""
        rope = self.rope(config)
        if rope.kind != "llama3":
            return {}
        return {"rope_freqs.weight": llama3_factors(rope, self.sizes(config).head_dim)}

    def biases(self, config: Config) -> frozenset[str]:
        """All modules of attention, all of the MLP, or none, as config.json says."""
        return frozenset(ATTENTION if config.flag("attention_bias") else ()) | frozenset(
            MLP if config.flag("mlp_bias") else ()
        )


class MistralFamily(LlamaFamily):
    """`MistralForCausalLM`."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **LlamaFamily.defaults,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    def biases(self, config: Config) -> frozenset[str]:
        """None: Mistral's config has no switch for them."""
        return frozenset()

    def warnings(self, config: Config) -> tuple[str, ...]:
        """llama.cpp computes Mistral as a Llama, without a window."""
        return window_warning(config)


class GraniteFamily(LlamaFamily):
    """`GraniteForCausalLM`."""

    architecture = "granite"
    fixed_head_dim = True
    defaults: ClassVar[Mapping[str, Any]] = {**LlamaFamily.defaults, **dict.fromkeys(_SCALES, 1.0)}

    def check(self, config: Config) -> None:
        """Refuse a scale of zero, which llama.cpp takes for a missing one."""
        super().check(config)
        for key in _SCALES:
            if config.number(key) == 0:
                raise config.bad(key, "it must not be zero")

    def fields(self, config: Config) -> dict[str, Field]:
        """Add the four scales."""
        return super().fields(config) | {key: Field.float32(config.number(name)) for name, key in _SCALES.items()}

    def head_fields(self, config: Config) -> dict[str, Field]:
        """None: llama.cpp derives the width from the sizes."""
        return {}
