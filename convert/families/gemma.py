"""Gemma 1, 2 and 3: norm weights stored minus one, norms before and after attention and MLP, sliding windows.

Gemma 2 caps its logits and gives every other layer a window. Gemma 3 norms q and k, gives five of six layers a window,
and rotates those with a base of their own.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from models.gguf.fields import Field

from .base import ATTENTION, MLP, QK_NORMS, Family
from .config import MAX_CONTEXT, Config
from .rope import FULL, SLIDING, Rope, read_rope

_NORMS: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ROPE_BASE = 10_000.0
# Images are not served: of a multimodal folder only the language model is converted.
_VISION = ("vision_tower.", "multi_modal_projector.")


class Gemma1Family(Family):
    """The first Gemma: its folders are not converted, but GGUF files of it can take an adapter."""

    architecture = "gemma"
    norm_offset = 1.0


class GemmaFamily(Family):
    """The rules that Gemma 2 and 3 share."""

    norm_offset = 1.0
    activations = ("gelu_pytorch_tanh",)
    period: ClassVar[int]
    """Every `period`-th layer has full attention, unless config.json lists the layers' kinds."""
    largest: ClassVar[int]
    """The number of layers by which llama.cpp recognises the 27B model, which scales its queries differently."""

    def check(self, config: Config) -> None:
        """Refuse a scale of the queries other than the one that llama.cpp derives from the sizes."""
        super().check(config)
        config.require("attention_bias", (None, False))
        config.require("use_bidirectional_attention", (None, False))
        sizes = self.sizes(config)
        scale = sizes.n_embd // sizes.n_head if sizes.n_layers == self.largest else sizes.head_dim
        if config.number("query_pre_attn_scalar") != scale:
            raise config.bad("query_pre_attn_scalar", f"llama.cpp computes with {scale} in a model of these sizes")
        self.windowed(config)

    def activation_key(self, config: Config) -> str:
        """`hidden_activation` if present: early Gemma configs hold a wrong value under the usual key."""
        return "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"

    def windowed(self, config: Config) -> list[bool]:
        """For each layer, true if its attention is limited to the window."""
        n_layers, kinds = self.sizes(config).n_layers, config.get("layer_types")
        if kinds is None:
            period = self.period
            if config.get("sliding_window_pattern") is not None:
                period = config.integer("sliding_window_pattern", n_layers + self.period)
            return [(layer + 1) % period != 0 for layer in range(n_layers)]
        if not isinstance(kinds, list) or len(kinds) != n_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
            raise config.bad("layer_types", f"it must name {FULL!r} or {SLIDING!r} for each of {n_layers} layers")
        return [kind == SLIDING for kind in kinds]

    def window_fields(self, config: Config) -> dict[str, Field]:
        """The window, and the layers that have it if they are not those of llama.cpp's own rule."""
        windowed = self.windowed(config)
        if not any(windowed):
            return {}
        fields = {"attention.sliding_window": Field.uint32(config.integer("sliding_window", MAX_CONTEXT))}
        if windowed != [(layer + 1) % self.period != 0 for layer in range(len(windowed))]:
            fields["attention.sliding_window_pattern"] = Field.boolean_array(windowed)
        return fields


class Gemma2Family(GemmaFamily):
    """`Gemma2ForCausalLM`."""

    architecture = "gemma2"
    layer_modules: ClassVar[Mapping[str, str]] = {**ATTENTION, **MLP, **_NORMS}
    period = 2
    largest = 46
    rope_kinds = ("default",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": _ROPE_BASE,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    }

    def check(self, config: Config) -> None:
        """Refuse uncapped logits, and layers that all have full attention."""
        super().check(config)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.number(key) == 0:
                raise config.bad(key, "llama.cpp caps the logits of a Gemma 2, so it must not be zero")
        if not any(self.windowed(config)):
            raise config.bad("layer_types", "llama.cpp gives some layers of a Gemma 2 a window")

    def check_head(self, config: Config) -> None:
        """Refuse an output matrix of its own, which llama.cpp would not read."""
        if not self.is_tied(config):
            raise config.bad(
                "tie_word_embeddings",
                "llama.cpp always takes a Gemma 2's embedding for its output, and these weights have an output that "
                "was trained apart: train neither, or both tied",
            )

    def fields(self, config: Config) -> dict[str, Field]:
        """Add the window and both caps; omit RoPE's base where it is llama.cpp's default."""
        fields = super().fields(config) | self.window_fields(config)
        if self.rope(config).theta == _ROPE_BASE:
            del fields["rope.freq_base"]
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            fields[key] = Field.float32(config.number(key))
        return fields


class Gemma3Family(GemmaFamily):
    """`Gemma3ForCausalLM`, and the language model inside `Gemma3ForConditionalGeneration`."""

    architecture = "gemma3"
    layer_modules: ClassVar[Mapping[str, str]] = {**ATTENTION, **QK_NORMS, **MLP, **_NORMS}
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
        "rope_local_base_freq": _ROPE_BASE,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }

    def source_name(self, name: str) -> str | None:
        """Strip the prefix of the language model in a multimodal folder; None for the vision part."""
        inner = name.replace("language_model.", "")
        return None if inner.removeprefix("model.").startswith(_VISION) else super().source_name(inner)

    def check(self, config: Config) -> None:
        """Refuse a cap on attention, which llama.cpp does not apply to Gemma 3."""
        super().check(config)
        config.require("attn_logit_softcapping", (None,))

    def fields(self, config: Config) -> dict[str, Field]:
        """Add the window and RoPE's base within it."""
        fields = super().fields(config) | self.window_fields(config)
        fields["rope.freq_base_swa"] = Field.float32(self._window_rope(config).theta)
        if config.get("final_logit_softcapping"):
            fields["final_logit_softcapping"] = Field.float32(config.number("final_logit_softcapping"))
        return fields

    def _window_rope(self, config: Config) -> Rope:
        """The embeddings of windowed layers. transformers 4 has one number for them, and does not scale them."""
        local = {"rope_theta": config.get("rope_local_base_freq")}
        nested = config.get("rope_parameters")
        if isinstance(nested, dict) and isinstance(nested.get(SLIDING), dict):
            local = {**local, **nested[SLIDING]}
        return read_rope(Config(config.path, {"rope_parameters": local}, {}), ("default",))
