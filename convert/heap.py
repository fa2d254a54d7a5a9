"""What reading a large vocabulary leaves on the heap, and what it need not cost.

A tokenizer.json becomes over a million objects that are gone a second later. Python looks through all of them again
and again for garbage, and glibc keeps what they took: 34 MiB of Gemma's vocabulary here, 190 MiB in `tokenizers`.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def many_objects() -> Iterator[None]:
    """Around a function that makes very many objects and keeps few: faster, and their memory is free afterwards."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        give_back_freed()


def give_back_freed() -> None:
    """Hand the memory that has been freed back to the system, as far as the C library can."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
