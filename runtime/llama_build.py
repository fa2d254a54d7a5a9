"""What the installed llama.cpp was built for, without loading a model: for the doctor."""

from llama_cpp import llama_cpp

from .llama import backend_name


def describe_build() -> tuple[str, bool]:
    """(the backend a model would run on, whether layers can be offloaded to a GPU)."""
    offloads = bool(llama_cpp.llama_supports_gpu_offload())
    return backend_name(llama_cpp.llama_print_system_info().decode(), offloads=offloads), offloads
