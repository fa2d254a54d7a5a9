"""Gemma 3, its text half: norms on q and k, five layers that see a window to one that sees all."""

from .gemma2 import GEMMA_NORMS
from .names import ATTENTION, MLP, QK_NORMS, Names


class Gemma3(Names):
    """`Gemma3ForCausalLM`, and the language model inside `Gemma3ForConditionalGeneration`"""

    architecture = "gemma3"
    layer_modules = ATTENTION | QK_NORMS | MLP | GEMMA_NORMS
    norm_offset = 1.0
