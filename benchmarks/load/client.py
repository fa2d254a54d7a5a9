"""A timed client of OpenAI-compatible servers, and the closed loop of users who send with it.

TTFT counts from the *scheduled* send, so that time lost before the bytes go out stays visible. A fault of the server,
of the connection or of the stream becomes the sample's `error` and does not stop the run. The loop measures latency at
a steady concurrency, as a team's own jobs see it. Arrivals faster than the server can answer need an open loop, which
is another experiment.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from httpx_sse import EventSource

from benchmarks.errors import ServerFailed
from benchmarks.record import RequestSample

from .workload import LabelledExample

MAX_EVENT_BYTES = 1 << 20
ERROR_CHARS = 300
# The server is full, limits the rate, or is being restarted.
REFUSED_FOR_NOW = {429, 503}
DEFAULT_RETRY_S = 1.0
WorkItem = TypeVar("WorkItem")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ApiTarget:
    """A model at an OpenAI-compatible API (`base_url`: `…/v1`).

    `body` is merged over every request; a null in it removes the field. The key is sent, and never kept in a sample.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def uses_tls(self) -> bool:
        """False for plain HTTP: loading the CA certificates takes longer than a request to this machine."""
        return self.base_url.startswith("https:")


class OpenAiClient:
    """Sends one request per call and records when each part of the answer arrived, on `clock`.

    Without `keep_alive` each request has a connection of its own.
    """

    def __init__(
        self, target: ApiTarget, clock: Callable[[], float], *, timeout_s: float = 300.0, keep_alive: bool = True
    ) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
        self._http = httpx.AsyncClient(
            headers=target.headers, timeout=timeout_s, limits=limits, trust_env=False, verify=target.uses_tls
        )
        self._base_url = target.base_url.rstrip("/")
        self._target = target
        self._clock = clock

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def chat(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Stream `/chat/completions` with `prompt` as the one user message."""
        body = {"messages": [{"role": "user", "content": prompt}], **fields}
        return await self._stream(example, "/chat/completions", body, scheduled)

    async def complete(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Stream `/completions` that continue `prompt`."""
        return await self._stream(example, "/completions", {"prompt": prompt, **fields}, scheduled)

    async def decide(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Ask `/decisions` one question about `prompt`; the choice, which arrives whole, is the sample's text."""
        body = {"model": self._target.model, "input": prompt, **fields, **self._target.body}
        sent = self._clock()
        text, usage, error, retry_s = "", dict[str, Any](), None, None
        shares: dict[str, float] = {}
        try:
            response = await self._http.post(f"{self._base_url}/decisions", json=body)
            if response.status_code != 200:
                retry_s = _retry_s(response)
                raise ServerFailed(f"HTTP {response.status_code}: {response.text[:ERROR_CHARS]}")
            answer = response.json()
            first = answer["answers"][0]
            text, usage = str(first["choice"]), answer.get("usage") or {}
            shares = {str(one["value"]): float(one["probability"]) for one in first.get("probabilities") or ()}
        except (httpx.HTTPError, ServerFailed, ValueError, KeyError, TypeError, IndexError) as failure:
            error = _describe(failure)
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
            retry_after_s=retry_s,
            probabilities=shares,
        )

    async def _stream(
        self, example: LabelledExample, path: str, fields: Mapping[str, Any], scheduled: float
    ) -> RequestSample:
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self._target.model, **fields, **streaming, **self._target.body}
        body = {name: value for name, value in body.items() if value is not None}
        answer = _StreamedAnswer()
        sent = self._clock()
        error: str | None = None
        retry_s: float | None = None
        try:
            async with self._http.stream("POST", f"{self._base_url}{path}", json=body) as response:
                if response.status_code != 200:
                    retry_s = _retry_s(response)
                    detail = (await response.aread()).decode("utf-8", "replace")[:ERROR_CHARS]
                    raise ServerFailed(f"HTTP {response.status_code}: {detail}")
                async with aclosing(sse_events(response)) as events:
                    async for event in events:
                        answer.take(event, self._clock())
            error = answer.fault()
        except (httpx.HTTPError, ServerFailed, ValueError, KeyError, TypeError, AttributeError) as failure:
            error = _describe(failure)
        return RequestSample(
            id=example.id,
            label=example.label,
            scheduled_s=scheduled,
            sent_s=sent,
            deltas_s=tuple(answer.deltas),
            finished_s=self._clock() if answer.finished is None else answer.finished,
            text="".join(answer.text),
            prompt_tokens=answer.usage.get("prompt_tokens"),
            cached_tokens=answer.usage.get("cached_tokens"),
            completion_tokens=answer.usage.get("completion_tokens"),
            error=error,
            retry_after_s=retry_s,
        )


async def sse_events(response: httpx.Response, *, pause_s: float = 0.0) -> AsyncGenerator[str, None]:
    """Yield the data of each server-sent event as it arrives. A slow reader pauses after each chunk of the body.

    Raises ValueError when more than MAX_EVENT_BYTES arrive without completing an event, SSEError (an httpx.HTTPError)
    when the response is not an event stream.
    """
    assert isinstance(response.stream, httpx.AsyncByteStream)
    body = _BoundedBody(response.stream, pause_s)
    response.stream = body
    async with aclosing(EventSource(response).aiter_sse()) as events:
        async for event in events:
            body.unread_bytes = 0
            if event.data:
                yield event.data


class _BoundedBody(httpx.AsyncByteStream):
    """A response body that bounds the bytes read since the last event: the SSE decoder buffers them."""

    def __init__(self, body: httpx.AsyncByteStream, pause_s: float) -> None:
        self._body = body
        self._pause_s = pause_s
        self.unread_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._body:
            self.unread_bytes += len(chunk)
            if self.unread_bytes > MAX_EVENT_BYTES:
                raise ValueError(f"event of the stream exceeds {MAX_EVENT_BYTES} bytes")
            yield chunk
            if self._pause_s:
                await asyncio.sleep(self._pause_s)

    async def aclose(self) -> None:
        await self._body.aclose()


class _StreamedAnswer:
    """Text, arrival times and usage of one streamed answer."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._error: str | None = None
        self.deltas: list[float] = []
        self.text: list[str] = []
        self.finished: float | None = None
        self.usage: dict[str, int | None] = {}

    def take(self, data: str, now: float) -> None:
        """Add an event that arrived at `now`. Raises ValueError when it is not JSON."""
        if data == "[DONE]":
            return
        event = json.loads(data)
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
        """The fault of a stream that has ended, or None."""
        if self._error:
            return f"error event: {self._error}"
        if self._reason is None:
            return "the stream ended without a finish reason"
        return None


def _retry_s(response: httpx.Response) -> float | None:
    """The seconds to wait before the next try; None if the request must not be sent again."""
    if response.status_code not in REFUSED_FOR_NOW:
        return None
    said = response.headers.get("retry-after", "")
    # A date is allowed, too; hardly any API sends one.
    return float(said) if said.isdigit() else DEFAULT_RETRY_S


def _describe(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"[: ERROR_CHARS + 40]


async def closed_loop(
    items: Sequence[WorkItem],
    concurrency: int,
    send: Callable[[WorkItem, float], Awaitable[Result]],
    clock: Callable[[], float],
) -> tuple[Result, ...]:
    """Send every item once, at most `concurrency` at a time; results in the order of `items`.

    `send(item, scheduled)` gets the moment its user became free, on `clock`. It must turn faults of the server into
    results: an exception stops the loop and is raised in an ExceptionGroup.
    """
    results: dict[int, Result] = {}
    remaining = iter(enumerate(items))

    async def user() -> None:
        for index, item in remaining:
            results[index] = await send(item, clock())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(user())
    return tuple(results[index] for index in range(len(items)))
