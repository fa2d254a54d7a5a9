"""A batch's way into the engine: the same preparation and the same fold as the server's, without HTTP between."""

import asyncio
from collections.abc import Mapping
from typing import Any

from .batch_input import BatchLine
from .errors import Overloaded
from .intake import Serving, fold, prepare
from .openai import MAX_CHOICES
from .openai_answer import Call
from .openai_error import to_error
from .openai_fields import Kind
from .worker import Worker
from .worker_stream import Stream

KINDS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


def queue_for(window: int) -> int:
    """How many answers must be able to wait so that a line with the most choices fits beside a window of others."""
    return window + MAX_CHOICES


class EngineAnswerer:
    """Answers batch lines through a worker, on the event loop that calls it."""

    def __init__(self, served: Serving, worker: Worker) -> None:
        self._served = served
        self._worker = worker
        self._ended = asyncio.Event()

    async def answer(self, line: BatchLine) -> dict[str, object]:
        """OpenAI's response body. Cancelled, it frees what the engine holds for the line."""
        call = prepare(KINDS[line.url], _with_seed(line), self._served)
        try:
            return await fold(call, await self._submit(call))
        finally:
            self._ended.set()

    async def _submit(self, call: Call) -> Stream:
        while True:
            self._ended.clear()
            try:
                return self._worker.submit(*call.requests, whole=True)
            except Overloaded:
                await self._ended.wait()

    def describe(self, error: Exception) -> Mapping[str, Any]:
        """OpenAI's error object."""
        body: dict[str, Any] = to_error(error)[1]["error"]
        return body

    def require_alive(self) -> None:
        """Raise EngineDown or ShuttingDown if the worker takes no requests any more."""
        self._worker.require_room(0)


def _with_seed(line: BatchLine) -> dict[str, Any]:
    """The line's body. A seed that is not given is made from the line, so that a batch run twice answers the same."""
    if line.body.get("seed") is not None:
        return dict(line.body)
    return {**line.body, "seed": int(line.fingerprint[:15], 16)}
