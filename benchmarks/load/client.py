"""One request to an OpenAI-compatible server, timed by the client.

TTFT counts from the *scheduled* send, so time lost before the bytes go out is not hidden. A fault of the server, of the
connection or of the stream becomes the sample's `error`; nothing of it stops the run.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from benchmarks.errors import ServerFailed
from benchmarks.record import RequestSample

from .workload import LabelledExample

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


ERROR_CHARS = 300


class OpenAiClient:
    """Streams one completion per call from `base_url` (`…/v1`), and keeps when each chunk arrived.

    `body` is merged over every request; a null in it removes the field. The key is sent, and never kept in a sample.
    Without `keep_alive` each request has a connection of its own.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = 300.0,
        keep_alive: bool = True,
        clock: Callable[[], float],
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
        self._http = httpx.AsyncClient(headers=headers, timeout=timeout_s, limits=limits, trust_env=False)
        self._base_url = base_url.rstrip("/")
        self._model = model
        self._body = dict(body or {})
        self._clock = clock

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def chat(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Ask `/chat/completions` with `prompt` as the one user message."""
        body = {"messages": [{"role": "user", "content": prompt}], **fields}
        return await self._send(example, "/chat/completions", body, scheduled)

    async def complete(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Ask `/completions` to continue `prompt`."""
        return await self._send(example, "/completions", {"prompt": prompt, **fields}, scheduled)

    async def decide(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Ask `/decisions` one question about `prompt`; the choice, which comes whole, is the sample's text."""
        body = {"model": self._model, "input": prompt, **fields, **self._body}
        sent = self._clock()
        text, usage, error = "", dict[str, Any](), None
        try:
            response = await self._http.post(f"{self._base_url}/decisions", json=body)
            if response.status_code != 200:
                raise ServerFailed(f"HTTP {response.status_code}: {response.text[:ERROR_CHARS]}")
            answer = response.json()
            text, usage = str(answer["answers"][0]["choice"]), answer.get("usage") or {}
        except (httpx.HTTPError, ServerFailed, ValueError, KeyError, TypeError, IndexError) as failure:
            error = f"{type(failure).__name__}: {failure}"[: ERROR_CHARS + 40]
        now = self._clock()
        return RequestSample(
            id=example.id,
            label=example.label,
            scheduled_s=scheduled,
            sent_s=sent,
            deltas_s=(now,) if text else (),
            finished_s=now,
            text=text,
            prompt_tokens=usage.get("input_tokens"),
            cached_tokens=(usage.get("input_tokens_details") or {}).get("cached_tokens"),
            completion_tokens=usage.get("output_tokens"),
            error=error,
        )

    async def _send(
        self, example: LabelledExample, path: str, fields: Mapping[str, Any], scheduled: float
    ) -> RequestSample:
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self._model, **fields, **streaming, **self._body}
        body = {name: value for name, value in body.items() if value is not None}
        reading = _Reading()
        sent = self._clock()
        error: str | None = None
        try:
            async with self._http.stream("POST", f"{self._base_url}{path}", json=body) as response:
                if response.status_code != 200:
                    detail = (await response.aread()).decode("utf-8", "replace")[:ERROR_CHARS]
                    raise ServerFailed(f"HTTP {response.status_code}: {detail}")
                async for chunk in response.aiter_bytes():
                    reading.take(chunk, self._clock())
            error = reading.fault()
        except (httpx.HTTPError, ServerFailed, ValueError, KeyError, TypeError, AttributeError) as failure:
            error = f"{type(failure).__name__}: {failure}"[: ERROR_CHARS + 40]
        return RequestSample(
            id=example.id,
            label=example.label,
            scheduled_s=scheduled,
            sent_s=sent,
            deltas_s=tuple(reading.deltas),
            finished_s=self._clock() if reading.finished is None else reading.finished,
            text="".join(reading.text),
            **reading.usage,
            error=error,
        )


class _Reading:
    """What a stream has said so far."""

    def __init__(self) -> None:
        self._parser = SseParser()
        self._reason: str | None = None
        self._error: str | None = None
        self.deltas: list[float] = []
        self.text: list[str] = []
        self.finished: float | None = None
        self.usage: dict[str, int | None] = {}

    def take(self, chunk: bytes, now: float) -> None:
        """Take in bytes that arrived at `now`."""
        for data in self._parser.feed(chunk):
            if data != "[DONE]":
                self._event(json.loads(data), now)

    def _event(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            self._error = json.dumps(event["error"])[:ERROR_CHARS]
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text:
                self.deltas.append(now)
                self.text.append(text)
            if choice.get("finish_reason"):
                self._reason = choice["finish_reason"]
                self.finished = now
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            self.usage = {
                "prompt_tokens": usage.get("prompt_tokens"),
                "cached_tokens": details.get("cached_tokens"),
                "completion_tokens": usage.get("completion_tokens"),
            }

    def fault(self) -> str | None:
        """What is wrong with a stream that has ended, or None."""
        if self._error:
            return f"error event: {self._error}"
        if self._reason is None:
            return "the stream ended without a finish reason"
        return None
