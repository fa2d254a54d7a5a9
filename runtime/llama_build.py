"""What the installed llama.cpp was built for, without loading a model: for the doctor."""

from llama_cpp import llama_cpp

from .llama import backend_name
from .llama_handle import system_info


def describe_build() -> tuple[str, bool]:
    """(the backend a model would run on, whether layers can be offloaded to a GPU)."""
    offloads = bool(llama_cpp.llama_supports_gpu_offload())
    return backend_name(system_info(), offloads=offloads), offloads
