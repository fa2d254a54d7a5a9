"""Token bytes → text, one token at a time: whole characters only, and never a part of a stop string.

Pure; one `TextStream` per answer. Its pieces joined are what decoding the whole answer at once would give, up to the
stop string that is complete first (of two that end at the same character, the longer).
"""

import codecs
from collections.abc import Callable


class TextStream:
    """The text of one answer, released as soon as no later token can change it."""

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...] = ()) -> None:
        self._token_bytes = token_bytes
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
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
        if not self._stop:
            return text
        text = self._held + text
        end = self._first_stop(text)
        if end is not None:
            self.stopped = True
            self._held = ""
            return text[:end]
        keep = self._held_back(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> int | None:
        """The place at which a stop string ends the text, or None."""
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _held_back(self, text: str) -> int:
        """The number of last characters of `text` that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
