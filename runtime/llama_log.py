"""llama.cpp's own log lines: to Python's logging instead of stderr, and kept while loading to say why it failed."""

import ctypes
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from llama_cpp import llama_cpp

_log = logging.getLogger("deskside.llama")

# ggml.h's levels. What fails also raises, with these lines in it where they explain: nothing is above a warning.
_LEVELS = {2: logging.DEBUG, 3: logging.INFO, 4: logging.INFO}
_ERROR = 4
_KEPT_LINES = 4


def _write(level: int, text: bytes, _user_data: object) -> None:
    _log.log(_LEVELS.get(level, logging.DEBUG), "%s", text.decode(errors="replace").rstrip())


# C keeps the pointer only: the callback object must live as long as the process.
_TO_LOGGING = llama_cpp.llama_log_callback(_write)


def route_log() -> None:
    """Send llama.cpp's log to the logger `deskside.llama`."""
    llama_cpp.llama_log_set(_TO_LOGGING, ctypes.c_void_p(None))


@contextmanager
def last_errors() -> Iterator[deque[str]]:
    """Collect the last error lines that llama.cpp writes meanwhile (in the whole process)."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def collect(level: int, text: bytes, user_data: object) -> None:
        if level == _ERROR and text.strip():
            lines.append(text.decode(errors="replace").strip())
        _write(level, text, user_data)

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(None))
    try:
        yield lines
    finally:
        route_log()


def reason(errors: Iterable[str]) -> str:
    """What `last_errors` gathered, in one line."""
    return "; ".join(errors) or "llama.cpp gives no reason"
