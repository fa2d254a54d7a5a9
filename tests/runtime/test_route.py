"""The way of one chat request through the house: the files and rooms that it enters, in order, and how many."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.config import RuntimeConfig
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import serving

RUNTIME = Path(__file__).parents[2] / "runtime"
# The server's own clock, which ticks with or without a request.
CLOCK = "runtime/server/serve.py"
MAX_FILES = 28
MAX_ROOMS = 11

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0, "stream": True}


class Route:
    """The product files whose functions are called while `recording`, in order of their first call."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}
        self.recording = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if self.recording and event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(RUNTIME) and (file := path.relative_to(RUNTIME.parent).as_posix()) != CLOCK:
                self.files.setdefault(file)

    @property
    def rooms(self) -> list[str]:
        return list(dict.fromkeys(file.rpartition("/")[0] for file in self.files))


@contextmanager
def traced() -> Iterator[Route]:
    """Trace this thread, and every thread that begins within the block."""
    route, before = Route(), sys.getprofile()
    threading.setprofile(route)
    sys.setprofile(route)
    try:
        yield route
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def test_a_streamed_chat_request_enters_few_files_and_rooms() -> None:
    with traced() as route, serving(FakeLlama(script="good day"), RuntimeConfig(slots=2)) as running:
        route.recording = True
        answer = running.http.post("/v1/chat/completions", json=BODY)
        route.recording = False
    assert answer.text.endswith("data: [DONE]\n\n")
    print("", *route.files, f"{len(route.files)} files in {len(route.rooms)} rooms: {route.rooms}", sep="\n")
    assert len(route.files) <= MAX_FILES
    assert len(route.rooms) <= MAX_ROOMS
