"""What a model may be called in its own file: by `general.name` alone llama.cpp tells one habit of Phi-3's tokenizer.

In a model whose name holds `phi-3` or `phi3`, special tokens swallow the white space after them; such a vocabulary
lost that under any other name, and another one under this name would take it on, or not load at all.
"""

import re

NAME_THAT_STRIPS = "phi-3"
_STRIPS = re.compile(r"(phi)-?(3)", re.IGNORECASE)


def name_part(name: str) -> str:
    """What `name` says to llama.cpp: NAME_THAT_STRIPS, or nothing."""
    return NAME_THAT_STRIPS if _STRIPS.search(name) else ""


def general_name(name: str, part: str) -> str:
    """`name`, changed as little as it takes to say to llama.cpp what `part` says: `mails (phi-3)`, `phi 3 mails`."""
    if name_part(name) == part:
        return name
    return f"{name} ({part})" if part else _STRIPS.sub(r"\1 \2", name)
