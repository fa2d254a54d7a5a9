"""Qwen 3: norms on the heads of q and k instead of biases."""

from collections.abc import Mapping
from typing import Any, ClassVar

from .config import Config
from .names import ATTENTION, MLP, PRE_NORMS, QK_NORMS
from .qwen2 import Qwen2


class Qwen3(Qwen2):
    """`Qwen3ForCausalLM`"""

    architecture = "qwen3"
    layer_modules = ATTENTION | QK_NORMS | MLP | PRE_NORMS
    fixed_head_dim = False
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "head_dim": 128}

    def check(self, config: Config) -> None:
        """llama.cpp has no bias on the output of attention here."""
        super().check(config)
        config.require("attention_bias", (None, False))

    def biases(self, config: Config) -> frozenset[str]:
        """None."""
        return frozenset()
