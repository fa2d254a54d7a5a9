"""The model families a Hugging Face folder may be of, by the class its config.json names and by GGUF architecture."""

from collections.abc import Mapping
from types import MappingProxyType

from .base import Family
from .gemma import Gemma2, Gemma3
from .llama import Granite, Llama, Mistral
from .olmo2 import Olmo2
from .phi3 import Phi3
from .qwen import Qwen2, Qwen3
from .stablelm import StableLm

BY_CLASS: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Llama(),
        "MistralForCausalLM": Mistral(),
        "Qwen2ForCausalLM": Qwen2(),
        "Qwen3ForCausalLM": Qwen3(),
        "Gemma2ForCausalLM": Gemma2(),
        "Gemma3ForCausalLM": Gemma3(),
        "Gemma3ForConditionalGeneration": Gemma3(),
        "Phi3ForCausalLM": Phi3(),
        "GraniteForCausalLM": Granite(),
        "Olmo2ForCausalLM": Olmo2(),
        "StableLmForCausalLM": StableLm(),
    }
)
"""A class of transformers, as `architectures` in config.json has it -> the family."""

BY_ARCHITECTURE: Mapping[str, Family] = MappingProxyType(
    {family.architecture: family for family in reversed(tuple(BY_CLASS.values()))}
)
"""`general.architecture` of a GGUF -> the family; Mistral's files say "llama"."""
