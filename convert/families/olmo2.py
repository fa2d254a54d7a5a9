"""OLMo 2: no norm before attention or MLP, one after each, and norms over the whole width of q and k."""

from collections.abc import Mapping
from typing import ClassVar

from .names import ATTENTION, MLP, QK_NORMS, Names


class Olmo2(Names):
    """`Olmo2ForCausalLM`"""

    architecture = "olmo2"
    layer_modules: ClassVar[Mapping[str, str]] = {
        **ATTENTION,
        **QK_NORMS,
        **MLP,
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
