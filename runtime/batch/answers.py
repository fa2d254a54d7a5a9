"""Answers to batch lines from an engine, by the same calls as the server's, without HTTP."""

import asyncio
from typing import Any

from runtime.errors import Overloaded
from runtime.openai.chat import MAX_ANSWERS_PER_CALL
from runtime.requests import Work
from runtime.serving.model import ServedModel
from runtime.serving.routes import ROUTES
from runtime.worker.inflight import Stream

from .lines import BatchLine

# The routes that take a seed.
_SEEDED = ("/v1/chat/completions", "/v1/completions")


def queue_for(window: int) -> int:
    """The queue length at which a line of the most choices fits beside `window` others."""
    return window + MAX_ANSWERS_PER_CALL


class EngineAnswerer:
    """Answers batch lines through a model's engine, on the event loop that calls it."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._ended = asyncio.Event()

    async def answer(self, line: BatchLine) -> dict[str, Any]:
        """Return OpenAI's response body. When cancelled, cancel the line's requests."""
        call = ROUTES[line.url].prepare(_body(line), self._model)
        try:
            return await call.fold(await self._submit(call.work))
        finally:
            self._ended.set()

    async def _submit(self, work: tuple[Work, ...]) -> Stream:
        while True:
            self._ended.clear()
            try:
                return self._model.supervisor.submit(*work, whole=True)
            except Overloaded:
                await self._ended.wait()

    def require_alive(self) -> None:
        """Raise EngineDown or ShuttingDown if the supervisor takes no requests any more."""
        self._model.supervisor.require_room(0)


def _body(line: BatchLine) -> dict[str, Any]:
    """The line's body. A missing seed is derived from the line, so that a batch run twice gives the same answers."""
    if line.url not in _SEEDED or line.body.get("seed") is not None:
        return dict(line.body)
    return {**line.body, "seed": int(line.fingerprint[:15], 16)}
