"""Reads tool calls out of an answer while it is written: text → content and call deltas. Pure; one reader an answer."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from .openai_tool_formats import ToolFormat

_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """News of call number `index`: its `name`, with the first news only, and more of its arguments."""

    index: int
    id: str
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Told:
    """What a piece of an answer said: content, then calls; at most one delta for each call."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class ToolCallReader:
    """Splits the text of one answer. Feed it every piece, then `finish`."""

    def __init__(self, form: ToolFormat, request_id: str) -> None:
        self._form = form
        self._request_id = request_id
        self._state: Literal["text", "only text", "head", "arguments"] = "text"
        self._buffer = ""
        self._head = re.compile(re.escape(form.lead) + "([a-zA-Z0-9_-]+)" + re.escape(form.middle))
        self._depth, self._in_string, self._escaped = 0, False, False
        self.n_calls = 0

    def feed(self, text: str) -> Told:
        """What `text` lets be told; maybe nothing yet."""
        self._buffer += text
        content, deltas = "", dict[int, CallDelta]()
        state = None
        while state != self._state:
            state = self._state
            if state in ("text", "only text"):
                content += self._text()
            elif state == "head":
                self._read_head(deltas)
            else:
                self._read_arguments(deltas)
        return Told(content, tuple(deltas.values()))

    def finish(self) -> str:
        """The content that was held back, in case it would turn out to begin a call."""
        held, self._buffer = self._buffer, ""
        return held if self._state in ("text", "only text") else ""

    def _text(self) -> str:
        marker = self._form.marker
        if self._state == "only text":
            return self._take(len(self._buffer))
        if not marker:
            if self._buffer:
                self._state = "head" if self._buffer[0] == "{" else "only text"
            return ""
        start = self._buffer.find(marker)
        if start >= 0:
            content = self._take(start).rstrip(_SPACE)
            self._take(len(marker))
            self._state = "head"
            return content
        longest = min(len(self._buffer), len(marker) - 1)
        keep = next((n for n in range(longest, 0, -1) if marker.startswith(self._buffer[-n:])), 0)
        # The white space before a call belongs to neither.
        return self._take(len(self._buffer[: len(self._buffer) - keep].rstrip(_SPACE)))

    def _read_head(self, deltas: dict[int, CallDelta]) -> None:
        found = self._head.search(self._buffer)
        if found is None:
            return
        self._take(found.end())
        index, self.n_calls = self.n_calls, self.n_calls + 1
        deltas[index] = CallDelta(index, self._id(index), found[1], "")
        self._state = "arguments"

    def _read_arguments(self, deltas: dict[int, CallDelta]) -> None:
        index = self.n_calls - 1
        piece = self._take(self._end_of_arguments())
        if piece:
            before = deltas.get(index, CallDelta(index, self._id(index), None, ""))
            deltas[index] = CallDelta(index, before.id, before.name, before.arguments + piece)

    def _end_of_arguments(self) -> int:
        """How much of the buffer belongs to the arguments; where they end, what follows is a head again."""
        for place, character in enumerate(self._buffer):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "head"
                    return place + 1
        return len(self._buffer)

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def _id(self, index: int) -> str:
        """The same for the same answer, so that a stream and a fold agree."""
        drawn = hashlib.sha256(f"{self._request_id}/{index}".encode()).hexdigest()
        return drawn[: self._form.id_chars] if self._form.id_chars else f"call_{drawn[:24]}"
