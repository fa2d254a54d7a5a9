"""Granite 3: a Llama whose embeddings, residuals, attention and logits are scaled."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.gguf.fields import Field

from .config import Config
from .llama import Llama

_SCALES = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


class Granite(Llama):
    """`GraniteForCausalLM`"""

    architecture = "granite"
    fixed_head_dim = True
    defaults: ClassVar[Mapping[str, Any]] = {**Llama.defaults, **dict.fromkeys(_SCALES, 1.0)}

    def check(self, config: Config) -> None:
        """A scale of zero would be taken for none."""
        super().check(config)
        for key in _SCALES:
            if config.number(key) == 0:
                raise config.bad(key, "it must not be zero")

    def fields(self, config: Config) -> dict[str, Field]:
        """With the four scales."""
        return super().fields(config) | {key: Field.float32(config.number(name)) for name, key in _SCALES.items()}

    def head_fields(self, config: Config) -> dict[str, Field]:
        """None: llama.cpp takes the width from the sizes."""
        return {}
