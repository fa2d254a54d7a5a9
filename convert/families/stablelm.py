"""StableLM 2: layer norms with biases, rotary embeddings on part of each head."""

from collections.abc import Mapping
from typing import ClassVar

from .names import ATTENTION, MLP, PRE_NORMS, Names


class StableLm(Names):
    """`StableLmForCausalLM`"""

    architecture = "stablelm"
    layer_modules: ClassVar[Mapping[str, str]] = {
        **ATTENTION,
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        **MLP,
        **PRE_NORMS,
    }
