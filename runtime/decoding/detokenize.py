"""Token bytes → text, one token at a time: whole characters only, and never a part of a stop string.

Pure; one `TextStream` per answer. Its pieces joined are what decoding the whole answer at once would give, up to the
stop string that is complete first (of two that end at the same character, the longer). A call to a tool is not text:
once it began, nothing stops it.
"""

import codecs
from collections.abc import Callable


class TextStream:
    """The text of one answer, released as soon as no later token can change it."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: tuple[str, ...] = (),
        call_mark: str = "",
        *,
        calls_first: bool = False,
    ) -> None:
        """`call_mark` begins a call: anywhere, or as the first text of an answer only (`calls_first`)."""
        self._token_bytes = token_bytes
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._mark = call_mark
        self._calls_first = calls_first
        self._recent, self._n_released = "", 0
        self._calls = False
        self.stopped = False

    def push(self, token: int) -> str:
        """Add `token` and return the text that it releases, maybe none. Sets `stopped` at a complete stop string."""
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The text still held back, once no more tokens come; half a character becomes U+FFFD."""
        released = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return released + rest

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stop or self._calls:
            return text
        text, self._held = self._held + text, ""
        stop, call = self._first_stop(text), self._call(text)
        if call is not None and (stop is None or call < stop[0]):
            self._calls = True
            return text
        if stop is not None:
            self.stopped = True
            return text[: stop[1]]
        keep = self._held_back(text)
        self._held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        self._recent = (self._recent + text)[-len(self._mark) :] if self._mark else ""
        self._n_released += len(text)
        return text

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """The end and the beginning in the text of the stop string that is complete first; None without one."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found) if found else None

    def _call(self, text: str) -> int | None:
        """The place in the text, or before it, at which the mark of a call is complete, or None."""
        if not self._mark:
            return None
        whole = self._recent + text
        start = whole.find(self._mark)
        if start < 0 or (self._calls_first and (start > 0 or self._n_released > len(self._recent))):
            return None
        return start + len(self._mark) - len(self._recent)

    def _held_back(self, text: str) -> int:
        """The number of last characters of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
