"""A call on a large stack: compiling a grammar recurses as deep as its rules nest; running out kills the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

# Measured: 6,000 Lark rules that each name the next, or 5,000 schema references, compile within 64 MiB; an accepted
# grammar is too small in bytes for more than about 8,000. Only what is used of it becomes memory.
STACK_BYTES = 256 << 20
# The size is one setting of the whole process.
_STACK_SIZE_LOCK = threading.Lock()

T = TypeVar("T")


def on_large_stack(call: Callable[[], T]) -> T:
    """`call()`, in a thread of its own with STACK_BYTES of stack. Raises what it raises."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - handed over to the caller
            done.set_exception(error)

    thread = threading.Thread(target=work, name="deskside-grammar", daemon=True)
    with _STACK_SIZE_LOCK:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return done.result()
