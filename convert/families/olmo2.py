"""OLMo 2: norms after attention and MLP, none before them, and norms over the whole width of q and k."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from .base import Family, Weight
from .config import Config, Sizes
from .names import ATTENTION, MLP, QK_NORMS


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
