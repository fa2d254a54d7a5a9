"""llama-cpp-python's own server. Run by the peers' Python; the arguments are those of `python -m llama_cpp.server`.

The one thing added is the guard that Deskside uses as well: where llama.cpp was compiled with AMX, its tile layouts
stay off, because some compilers get them wrong and the server would answer nonsense (or crash).
"""

from typing import Any

from llama_cpp import llama_cpp
from llama_cpp.server.__main__ import main


def guard_amx() -> None:
    """Let models be loaded without extra buffer types where AMX is compiled in."""
    if b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info():
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
