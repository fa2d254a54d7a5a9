"""`/v1/responses` over HTTP: its server-sent events, which carry their names, and the wait for a whole response."""

import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .errors import Cancelled, EngineError
from .intake_responses import fold_response
from .openai_error import to_error
from .openai_responses_stream import ResponseAnswer, ResponseCall
from .server_stream import EventStream, JsonBytes, cancelled_on_disconnect, encode
from .worker_stream import Stream

_log = logging.getLogger("deskside.server")


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
