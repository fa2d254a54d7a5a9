"""Gemma 3, its text half: norms on q and k, five layers that see a window to one that sees all."""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.gguf.fields import Field

from .config import Config
from .gemma2 import GEMMA_NORMS, Gemma
from .names import ATTENTION, MLP, QK_NORMS
from .rope import SLIDING, Rope, read_rope

_WINDOW_ROPE_BASE = 10_000.0
# Images are not served: of a multimodal folder the language model is converted.
_VISION = ("vision_tower.", "multi_modal_projector.")


class Gemma3(Gemma):
    """`Gemma3ForCausalLM`, and the language model inside `Gemma3ForConditionalGeneration`"""

    architecture = "gemma3"
    layer_modules: ClassVar[Mapping[str, str]] = {**ATTENTION, **QK_NORMS, **MLP, **GEMMA_NORMS}
    period = 6
    largest = 62
    rope_kinds = ("default", "linear")
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": _WINDOW_ROPE_BASE,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }

    def source_name(self, name: str) -> str | None:
        """Without what stands around the language model in a multimodal folder."""
        inner = name.replace("language_model.", "")
        return None if inner.removeprefix("model.").startswith(_VISION) else super().source_name(inner)

    def check(self, config: Config) -> None:
        """Gemma 3 has no cap on attention."""
        super().check(config)
        config.require("attn_logit_softcapping", (None,))

    def fields(self, config: Config) -> dict[str, Field]:
        """With the window, and the base of the rotation in it."""
        fields = super().fields(config) | self.window_fields(config)
        fields["rope.freq_base_swa"] = Field.float32(self._window_rope(config).theta)
        if config.get("final_logit_softcapping"):
            fields["final_logit_softcapping"] = Field.float32(config.number("final_logit_softcapping"))
        return fields

    def _window_rope(self, config: Config) -> Rope:
        """transformers 4 has one number for it, and scales the other layers only."""
        local = {"rope_theta": config.get("rope_local_base_freq")}
        nested = config.get("rope_parameters")
        if isinstance(nested, dict) and isinstance(nested.get(SLIDING), dict):
            local = {**local, **nested[SLIDING]}
        return read_rope(Config(config.path, {"rope_parameters": local}, {}), ("default",))
