"""Answers over HTTP, whole in JSON or as server-sent events, cancelled when the client disconnects."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.openai.answer import AnswerChunk
from runtime.openai.wire import to_json
from runtime.serving.call import Call
from runtime.worker.inflight import Stream

# Names the parts of the request's schemas that the answer need not keep to.
NOT_ENFORCED = "deskside-not-enforced"
MAX_HEADER_CHARS = 1024
# Counts the user's texts that were cut to the length that the model was trained on.
TEXTS_CUT = "deskside-texts-cut"

# Made once: making one takes a third of the time of encoding a chunk.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# Key of the request's state: bytes that may come between two pieces of the answer, and mean nothing.
PROBE = "deskside.probe"


def encode(value: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return to_json(_JSON.encode(value))


class JsonBytes(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


async def respond(http: Request, call: Call, events: Stream) -> Response:
    """Answer a submitted call. Raises Cancelled if the client disconnects before a whole answer is sent."""
    headers = {NOT_ENFORCED: _header_text("; ".join(call.not_enforced))} if call.not_enforced else {}
    if call.n_cut:
        headers[TEXTS_CUT] = str(call.n_cut)
    if call.streams:
        return ServerSentEvents(call, events, headers)
    async with cancelled_on_disconnect(http.receive, events):
        answer = await call.fold(events)
        if call.large:
            return await asyncio.to_thread(JsonBytes, answer, headers=headers)
        return JsonBytes(answer, headers=headers)


def _header_text(text: str) -> str:
    """The text as a header may hold it: printable ASCII, and not too long."""
    return re.sub("[^ -~]", "?", text)[:MAX_HEADER_CHARS]


class ServerSentEvents(Response):
    """Streams the chunks of a call. Those of one engine step are sent in one piece."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, events: Stream, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._call = call
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[PROBE] = b": \n\n"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with cancelled_on_disconnect(receive, self._events):
            unsent: list[bytes] = []
            async for chunk in self._call.chunks(self._events):
                unsent.append(_event(chunk))
                if not self._events.ready:
                    # uvicorn waits here while the client does not read; the engine continues.
                    await send({"type": "http.response.body", "body": b"".join(unsent), "more_body": True})
                    unsent.clear()
        await send({"type": "http.response.body", "body": b"".join(unsent), "more_body": False})


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(receive: Receive, events: Stream) -> AsyncIterator[None]:
    """Cancel the requests behind `events` when the client disconnects, and on exit those that are still live."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        events.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        events.cancel()
        watcher.cancel()
        await asyncio.wait([watcher])


def _event(chunk: AnswerChunk) -> bytes:
    """One server-sent event, named by the `type` of its data if that has one."""
    if isinstance(chunk, str):
        return b"data: " + chunk.encode() + b"\n\n"
    name = b"event: " + str(chunk["type"]).encode() + b"\n" if "type" in chunk else b""
    return name + b"data: " + encode(chunk) + b"\n\n"
