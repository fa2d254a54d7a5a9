"""llama-cpp-python's own server. Run by the peers' Python; the arguments are those of `python -m llama_cpp.server`.

It adds only the guard that Deskside has too (runtime/llama/handle.py): a llama.cpp compiled for AMX without the patch
of Deskside's Makefile may crash or answer garbage with AMX's weight layouts, so it runs without them.
"""

from typing import Any

from llama_cpp import llama_cpp
from llama_cpp.server.__main__ import main


def guard_amx() -> None:
    """Load models without extra buffer types where llama.cpp has AMX without the patch."""
    built_for_amx = b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()
    if not built_for_amx or hasattr(llama_cpp._lib, "deskside_amx_mended"):
        return
    defaults = llama_cpp.llama_model_default_params

    def guarded() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = guarded


if __name__ == "__main__":
    guard_amx()
    main()
