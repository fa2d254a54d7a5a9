"""Llama 2 and 3.x, SmolLM2, TinyLlama: the family whose layout the others vary."""

from .names import Names


class Llama(Names):
    """`LlamaForCausalLM`"""

    architecture = "llama"
    permutes_qk = True
