"""StableLM 2: layer norms with biases, rotary embeddings on a part of each head."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from models.gguf.fields import Field

from .base import Family, Weight
from .config import MAX_CONTEXT, Config, Sizes
from .names import ATTENTION, MLP, PRE_NORMS

_ROPE_BASE = 10_000.0
_QK_NORMS = {"self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm"}


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
