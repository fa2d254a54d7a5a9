"""Families of one class each: OLMo 2, Phi-3 and Phi-4 mini, StableLM 2.

OLMo 2 has norms after attention and MLP, none before them, and norms over the whole width of q and k. Phi-3 has q, k
and v in one matrix, gate and up in another, and LongRoPE for long contexts. StableLM 2 has layer norms with biases, and
rotary embeddings on a part of each head.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from models.gguf.fields import Field

from .base import ATTENTION, MLP, PRE_NORMS, QK_NORMS, Family, Weight, window_warning
from .config import MAX_CONTEXT, Config, Sizes, is_number
from .rope import Rope

_ROPE_BASE = 10_000.0
_QK_NORMS = {"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"}


class Olmo2Family(Family):
    """`Olmo2ForCausalLM`."""

    architecture = "olmo2"
    layer_modules: ClassVar[Mapping[str, str]] = {
        **ATTENTION,
        **QK_NORMS,
        **MLP,
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    fixed_head_dim = True
    may_tie = False
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
    }

    def check(self, config: Config) -> None:
        """Refuse biases, a window and clipping, which llama.cpp does not have here."""
        super().check(config)
        config.require("attention_bias", (None, False))
        config.require("sliding_window", (None,))
        config.require("clip_qkv", (None,))

    def norm(self, module: str, sizes: Sizes) -> Iterator[Weight]:
        """Norms over all of q and all of k, before they are split into heads."""
        widths = {"q_norm": sizes.n_q, "k_norm": sizes.n_kv}
        yield self.weight(module, (widths.get(module.rpartition(".")[2], sizes.n_embd),))


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


class StableLmFamily(Family):
    """`StableLmForCausalLM`."""

    architecture = "stablelm"
    layer_modules: ClassVar[Mapping[str, str]] = {**ATTENTION, **_QK_NORMS, **MLP, **PRE_NORMS}
    fixed_head_dim = True
    rotates_part = True
    may_tie = False
    rope_kinds = ("default",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "layer_norm_eps": 1e-5,
        "rope_theta": _ROPE_BASE,
        "partial_rotary_factor": 0.25,
        "hidden_act": "silu",
    }

    def fields(self, config: Config) -> dict[str, Field]:
        """The fields, in this family's own order, with RoPE's base only if it is not llama.cpp's default."""
        sizes, rope = self.sizes(config), self.rope(config)
        rotated = int(rope.partial * sizes.head_dim)
        if not 2 <= rotated <= sizes.head_dim or rotated % 2:
            raise rope.bad(f"{rotated} of {sizes.head_dim} elements of a head would be rotated")
        fields = {
            "context_length": Field.uint32(config.integer("max_position_embeddings", MAX_CONTEXT)),
            "embedding_length": Field.uint32(sizes.n_embd),
            "block_count": Field.uint32(sizes.n_layers),
            "feed_forward_length": Field.uint32(sizes.n_ff),
            "rope.dimension_count": Field.uint32(rotated),
            "attention.head_count": Field.uint32(sizes.n_head),
            "attention.head_count_kv": Field.uint32(sizes.n_head_kv),
            "use_parallel_residual": Field.boolean(config.flag("use_parallel_residual")),
            "attention.layer_norm_epsilon": Field.float32(config.number("layer_norm_eps")),
        }
        return fields if rope.theta == _ROPE_BASE else {**fields, "rope.freq_base": Field.float32(rope.theta)}

    def biases(self, config: Config) -> frozenset[str]:
        """q, k and v, or none."""
        return frozenset(f"self_attn.{name}_proj" for name in ("q", "k", "v") if config.flag("use_qkv_bias"))

    def parts(self, config: Config) -> Iterator[str]:
        """The modules of a layer. The 12B model norms q and k, and shares one norm between attention and MLP."""
        for part in self.layer_modules:
            is_extra = part in _QK_NORMS and not config.flag("qk_layernorm")
            is_shared = part == "post_attention_layernorm" and config.flag("use_parallel_residual")
            if not is_extra and not is_shared:
                yield part

    def norm(self, module: str, sizes: Sizes) -> Iterator[Weight]:
        """Weight and bias of a layer norm; the norms of q and k have no bias and one weight per head."""
        heads = {"q_layernorm": sizes.n_head, "k_layernorm": sizes.n_head_kv}.get(module.rpartition(".")[2])
        if heads is None:
            yield self.weight(module, (sizes.n_embd,))
            yield self.weight(module, (sizes.n_embd,), kind="bias")
            return
        name = self.tensor_name(module)
        assert name is not None, f"{module!r} is in the table"
        yield Weight(name, tuple(f"{module}.norms.{head}.weight" for head in range(heads)), (sizes.head_dim,))
