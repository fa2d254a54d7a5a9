"""Answers over HTTP while the client may leave at any moment: server-sent events, and the wait for a whole answer."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from runtime.errors import Cancelled, EngineError
from runtime.openai.answer import Answer, Call
from runtime.openai.responses_stream import ResponseAnswer, ResponseCall
from runtime.openai.wire import to_error
from runtime.serving.chat import fold, fold_response
from runtime.serving.decisions import DecisionCall, fold_decision
from runtime.serving.embeddings import EmbeddingCall, fold_embedding
from runtime.worker.inflight import Stream

_log = logging.getLogger("deskside.server")

DONE = b"data: [DONE]\n\n"
# Kept: to make one takes a third of the time that encoding a chunk does.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode(value: Mapping[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return _JSON.encode(value).encode("utf-8")


class JsonBytes(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


@contextlib.asynccontextmanager
async def cancelled_on_disconnect(receive: Receive, stream: Stream) -> AsyncIterator[None]:
    """Within it, a client that leaves cancels its requests; at its end, so does whatever is still live."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        stream.cancel()
        watcher.cancel()
        await asyncio.wait([watcher])


async def whole_answer(request: Request, call: Call, stream: Stream) -> Response:
    """The folded answer. If the client leaves, the requests are cancelled and Cancelled is raised."""
    async with cancelled_on_disconnect(request.receive, stream):
        return JsonBytes(await fold(call, stream))


async def decided(request: Request, call: DecisionCall, stream: Stream) -> Response:
    """The answers to a call's questions. If the client leaves, it is cancelled and Cancelled is raised."""
    async with cancelled_on_disconnect(request.receive, stream):
        return JsonBytes(await fold_decision(call, stream))


async def embedded(request: Request, call: EmbeddingCall, stream: Stream) -> Response:
    """The vectors of a call's texts. If the client leaves, it is cancelled and Cancelled is raised."""
    async with cancelled_on_disconnect(request.receive, stream):
        vectors = await fold_embedding(call, stream)
        return await asyncio.to_thread(JsonBytes, vectors)  # it may be tens of megabytes


class EventStream(Response):
    """Streams an answer as server-sent events. A fault after the first byte is an error event, then the end.

    What comes of one step is sent in one piece.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, stream: Stream) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._call = call
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with cancelled_on_disconnect(receive, self._stream):
            told: list[bytes] = []
            async for data in self._events():
                told.append(data)
                if not self._stream.ready:
                    # uvicorn waits here while the client does not read; the engine does not.
                    await send({"type": "http.response.body", "body": b"".join(told), "more_body": True})
                    told.clear()
        await send({"type": "http.response.body", "body": b"".join(told), "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = Answer(self._call)
        try:
            for chunk in answer.first_chunks():
                yield _event(chunk)
            async for event in self._stream:
                if told := answer.feed(event):
                    yield _event(told)
        except Cancelled:
            return
        except Exception as error:  # noqa: BLE001 - the status line is out; the stream must say what broke
            status, body = to_error(error)
            if status >= 500:
                trace = None if isinstance(error, EngineError) else error
                _log.error("call %s failed while streaming: %s", self._call.id, error, exc_info=trace)
            yield _event(body)
            return
        for chunk in answer.last_chunks():
            yield _event(chunk)
        yield DONE


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


async def responded(request: Request, asked: ResponseCall, stream: Stream) -> Response:
    """The response, streamed or whole, as it was asked for."""
    if asked.call.stream:
        return ResponseEvents(asked, stream)
    async with cancelled_on_disconnect(request.receive, stream):
        return JsonBytes(await fold_response(asked, stream))


class ResponseEvents(EventStream):
    """Streams a response. A fault after the first byte is the event `response.failed`, then the end."""

    def __init__(self, asked: ResponseCall, stream: Stream) -> None:
        super().__init__(asked.call, stream)
        self._asked = asked

    async def _events(self) -> AsyncIterator[bytes]:
        answer = ResponseAnswer(self._asked, time.time)
        try:
            for told in answer.begin():
                yield _named(told)
            async for event in self._stream:
                for told in answer.feed(event):
                    yield _named(told)
        except Cancelled:
            return
        except Exception as error:  # noqa: BLE001 - the status line is out; the stream must say what broke
            _, body = to_error(error)
            trace = None if isinstance(error, EngineError) else error
            _log.error("response %s failed while streaming: %s", self._asked.id, error, exc_info=trace)
            for told in answer.fail(body["error"]):
                yield _named(told)


def _named(event: Mapping[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + encode(event) + b"\n\n"
