"""Mistral 7B and what descends from it: llama.cpp runs it as a Llama."""

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import window_warning
from .config import Config
from .llama import Llama


class Mistral(Llama):
    """`MistralForCausalLM`"""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    def biases(self, config: Config) -> frozenset[str]:
        """None: its config has no such switch."""
        return frozenset()

    def warnings(self, config: Config) -> tuple[str, ...]:
        """llama.cpp's Llama has no window."""
        return window_warning(config)
