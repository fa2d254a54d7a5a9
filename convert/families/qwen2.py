"""Qwen 2 and 2.5: biases on q, k and v."""

from .names import Names


class Qwen2(Names):
    """`Qwen2ForCausalLM`"""

    architecture = "qwen2"
