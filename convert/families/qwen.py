"""Qwen 2 and 2.5, with biases on q, k and v; Qwen 3, with norms on q and k instead."""

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import ATTENTION, MLP, PRE_NORMS, QK_NORMS, Family
from .config import MAX_LAYERS, Config
from .rope import SLIDING

_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})


class Qwen2Family(Family):
    """`Qwen2ForCausalLM`."""

    architecture = "qwen2"
    fixed_head_dim = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "max_window_layers": 28,
    }

    def check(self, config: Config) -> None:
        """Refuse a sliding window, which llama.cpp does not have in this family."""
        super().check(config)
        kinds = config.get("layer_types")
        if kinds is not None and (not isinstance(kinds, list) or SLIDING in kinds):
            raise config.bad("layer_types", "llama.cpp has no sliding window in this family")
        if kinds is None and config.flag("use_sliding_window") and config.get("sliding_window") is not None:
            windowless = config.integer("max_window_layers", MAX_LAYERS, least=0)
            if windowless < self.sizes(config).n_layers:
                raise config.bad("use_sliding_window", "llama.cpp has no sliding window in this family")

    def biases(self, config: Config) -> frozenset[str]:
        """q, k and v, always."""
        return _QKV


class Qwen3Family(Qwen2Family):
    """`Qwen3ForCausalLM`."""

    architecture = "qwen3"
    layer_modules = ATTENTION | QK_NORMS | MLP | PRE_NORMS
    fixed_head_dim = False
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2Family.defaults, "head_dim": 128}

    def check(self, config: Config) -> None:
        """Refuse biases in attention, which llama.cpp does not have here."""
        super().check(config)
        config.require("attention_bias", (None, False))

    def biases(self, config: Config) -> frozenset[str]:
        """None, unlike Qwen 2."""
        return frozenset()
