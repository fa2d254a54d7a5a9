"""Granite 3: a Llama whose embeddings, residuals, attention and logits are scaled."""

from .llama import Llama


class Granite(Llama):
    """`GraniteForCausalLM`"""

    architecture = "granite"
