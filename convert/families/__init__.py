"""The known model families, by the class that config.json names and by GGUF architecture."""

from collections.abc import Mapping
from types import MappingProxyType

from .base import Family
from .gemma import Gemma2Family, Gemma3Family
from .llama import GraniteFamily, LlamaFamily, MistralFamily
from .others import Olmo2Family, Phi3Family, StableLmFamily
from .qwen import Qwen2Family, Qwen3Family

BY_CLASS: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": LlamaFamily(),
        "MistralForCausalLM": MistralFamily(),
        "Qwen2ForCausalLM": Qwen2Family(),
        "Qwen3ForCausalLM": Qwen3Family(),
        "Gemma2ForCausalLM": Gemma2Family(),
        "Gemma3ForCausalLM": Gemma3Family(),
        "Gemma3ForConditionalGeneration": Gemma3Family(),
        "Phi3ForCausalLM": Phi3Family(),
        "GraniteForCausalLM": GraniteFamily(),
        "Olmo2ForCausalLM": Olmo2Family(),
        "StableLmForCausalLM": StableLmFamily(),
    }
)
"""A class of transformers, from `architectures` in config.json -> the family."""

BY_ARCHITECTURE: Mapping[str, Family] = MappingProxyType(
    {family.architecture: family for family in reversed(tuple(BY_CLASS.values()))}
)
"""`general.architecture` of a GGUF -> the family; Mistral's files say "llama"."""
