"""Server-sent events, incrementally: bytes in, the `data` of each whole event out.

Own code because the client must know when each event arrived, and what a broken stream leaves behind; the format
(WHATWG HTML, "server-sent events") is a dozen lines.
"""

from collections.abc import Iterator

MAX_EVENT_BYTES = 1 << 20


class SseParser:
    """Feed it what arrived; it yields the data of every event that became whole."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The events completed by `chunk`. Raises ValueError when a line exceeds MAX_EVENT_BYTES or is not UTF-8."""
        # A lone "\r" at the end may be half of "\r\n": it waits for the next chunk.
        lines = (self._buffer + chunk).replace(b"\r\n", b"\n")
        held = b"\r" if lines.endswith(b"\r") else b""
        *whole, rest = lines[: len(lines) - len(held)].replace(b"\r", b"\n").split(b"\n")
        self._buffer = rest + held
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ValueError(f"event stream line exceeds {MAX_EVENT_BYTES} bytes")
        for line in whole:
            yield from self._line(line.decode("utf-8"))

    def _line(self, line: str) -> Iterator[str]:
        if not line:
            if self._data:
                yield "\n".join(self._data)
            self._data = []
            return
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
