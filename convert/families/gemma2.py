"""Gemma 2: norms before and after each half of a layer, soft-capped logits, every other layer sees a window."""

from .names import ATTENTION, MLP, Names

GEMMA_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class Gemma2(Names):
    """`Gemma2ForCausalLM`"""

    architecture = "gemma2"
    layer_modules = ATTENTION | MLP | GEMMA_NORMS
    norm_offset = 1.0
