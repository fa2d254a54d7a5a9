"""Phi-3 mini and Phi-4 mini: q, k and v in one matrix, gate and up in another."""

from collections.abc import Mapping
from typing import ClassVar

from .names import PRE_NORMS, Names


class Phi3(Names):
    """`Phi3ForCausalLM`"""

    architecture = "phi3"
    layer_modules: ClassVar[Mapping[str, str]] = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        **PRE_NORMS,
    }
