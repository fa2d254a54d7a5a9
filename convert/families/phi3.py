"""Phi-3 mini and Phi-4 mini: q, k and v in one matrix, gate and up in another, LongRoPE for long contexts."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from models.gguf.fields import Field

from .base import Family, window_warning
from .config import MAX_CONTEXT, Config, is_number
from .names import PRE_NORMS
from .rope import Rope


class Phi3Family(Family):
    """`Phi3ForCausalLM`."""

    architecture = "phi3"
    layer_modules: ClassVar[Mapping[str, str]] = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        **PRE_NORMS,
    }
    fixed_head_dim = True
    rotates_part = True
    rope_kinds = ("default", "longrope")
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
    }

    def fields(self, config: Config) -> dict[str, Field]:
        """Add the rotated part of a head, the context before scaling, and the window (0 marks a Phi-4)."""
        rope = self.rope(config)
        window = 0 if config.get("sliding_window") is None else config.integer("sliding_window", MAX_CONTEXT, least=0)
        fields = {
            **super().fields(config),
            "rope.dimension_count": Field.uint32(self._rotated(config, rope)),
            "rope.scaling.original_context_length": Field.uint32(self._original(config)),
            "attention.sliding_window": Field.uint32(window),
        }
        if rope.kind == "longrope":
            fields["rope.scaling.attn_factor"] = Field.float32(self._attention_factor(config))
        return fields

    def head_fields(self, config: Config) -> dict[str, Field]:
        """None: llama.cpp derives the width from the sizes."""
        return {}

    def extras(self, config: Config) -> dict[str, np.ndarray]:
        """The divisors of the frequencies beyond the original context (long) and within it (short)."""
        rope = self.rope(config)
        if rope.kind != "longrope":
            return {}
        half = self._rotated(config, rope) // 2
        return {
            f"rope_factors_{name}.weight": np.array(_factors(rope, f"{name}_factor", half), dtype=np.float32)
            for name in ("long", "short")
        }

    def warnings(self, config: Config) -> tuple[str, ...]:
        """llama.cpp has disabled this family's window, and keeps to one of its two sets of rotations."""
        return (*window_warning(config), *self._length_warning(config))

    def _length_warning(self, config: Config) -> tuple[str, ...]:
        original = self._original(config)
        if self.rope(config).kind != "longrope" or config.integer("max_position_embeddings", MAX_CONTEXT) <= original:
            return ()
        return (
            f"prompt and answer may have {original} tokens together: beyond, this model rotates otherwise, and "
            "llama.cpp does so in all prompts or in none; with --long-prompts the model is served for long ones",
        )

    def _rotated(self, config: Config, rope: Rope) -> int:
        sizes = self.sizes(config)
        rotated = int(rope.partial * sizes.n_embd) // sizes.n_head
        if not 2 <= rotated <= sizes.head_dim or rotated % 2:
            raise rope.bad(f"{rotated} of {sizes.head_dim} elements of a head would be rotated")
        return rotated

    def _original(self, config: Config) -> int:
        return config.integer("original_max_position_embeddings", MAX_CONTEXT, least=2)

    def _attention_factor(self, config: Config) -> float:
        """LongRoPE's attention factor, https://arxiv.org/abs/2402.13753, section 4."""
        scale = config.integer("max_position_embeddings", MAX_CONTEXT) / self._original(config)
        return math.sqrt(1 + math.log(scale) / math.log(self._original(config))) if scale > 1 else 1.0


def _factors(rope: Rope, name: str, count: int) -> list[float]:
    found = rope.values.get(name)
    if not isinstance(found, list) or not all(is_number(value) and value > 0 for value in found):
        raise rope.bad(f"{name!r} must be a list of {count} positive numbers")
    if len(found) != count:
        raise rope.bad(f"{name!r} has {len(found)} numbers, {count} are needed")
    return [float(value) for value in found]
