"""Mistral 7B and what descends from it: llama.cpp runs it as a Llama."""

from .llama import Llama


class Mistral(Llama):
    """`MistralForCausalLM`"""
