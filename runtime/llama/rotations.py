"""The rotary embeddings of LongRoPE models (Phi-3, Phi-4-mini), which llama.cpp chooses by the size of the KV cache.

Such a file has two sets of divisors, for prompts within the length before scaling and for longer ones. transformers
takes the set that fits the prompt. llama.cpp takes one set for a whole context: the long one if the context has more
cells than that length, also for a prompt of ten tokens. Cells are shared by many sequences here, so the number of cells
says nothing about a prompt: the short set is kept, and the length of a request bounded, unless long prompts are wanted.
"""

from ctypes import Array
from dataclasses import dataclass
from pathlib import Path

from llama_cpp import llama_cpp

from models.errors import BadGguf
from models.gguf.header import read_tensors

_SETS = {"rope_factors_long.weight", "rope_factors_short.weight"}
_ORIGINAL = "rope.scaling.original_context_length"
_INTEGER = 0  # LLAMA_KV_OVERRIDE_TYPE_INT
_NEVER_REACHED = 1 << 30


@dataclass(frozen=True)
class ShortSet:
    """The short set of a file: `length` is the most tokens it is meant for, `key` the field that says so."""

    key: str
    length: int


def short_set(path: Path) -> ShortSet | None:
    """The file's short set; None for a model with one set, and for a file that cannot be read."""
    try:
        fields, tensors = read_tensors(path)
    except BadGguf:
        return None  # llama.cpp's own complaint is the one to show
    architecture = fields.get("general.architecture")
    key = f"{architecture.value}.{_ORIGINAL}" if architecture is not None else ""
    length = fields[key].value if key in fields else None
    return ShortSet(key, length) if isinstance(length, int) and tensors.keys() >= _SETS else None


def keep_short(short: ShortSet) -> Array[llama_cpp.llama_model_kv_override]:
    """Values for `kv_overrides`, in place of the file's own, with which llama.cpp keeps the short set."""
    overrides: Array[llama_cpp.llama_model_kv_override] = (
        llama_cpp.llama_model_kv_override * 2
    )()  # the last is empty: it ends the list
    # the last is empty, which ends the list
    overrides[0].tag = _INTEGER
    overrides[0].key = short.key.encode()
    overrides[0].value.val_i64 = _NEVER_REACHED
    return overrides
