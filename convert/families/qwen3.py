"""Qwen 3: norms on the heads of q and k instead of biases."""

from .names import ATTENTION, MLP, PRE_NORMS, QK_NORMS, Names


class Qwen3(Names):
    """`Qwen3ForCausalLM`"""

    architecture = "qwen3"
    layer_modules = ATTENTION | QK_NORMS | MLP | PRE_NORMS
