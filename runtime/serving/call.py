"""A call: a wire request prepared for the engine, and the wire answer made of the engine's events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from runtime.errors import Cancelled, EngineError
from runtime.openai.answer import AnswerChunk, WireAnswer
from runtime.openai.wire import to_error
from runtime.requests import Work
from runtime.worker.inflight import Stream, cancelling

_log = logging.getLogger("deskside.server")


@dataclass(frozen=True, slots=True)
class Call:
    """A prepared request of any endpoint: `work` is valid, tokenised, known to fit the context, and submitted together.

    `answer` makes a new, empty wire answer. `streams`: the client asked for chunks. `large`: the answer may be tens of
    megabytes, so it is built and encoded in a thread. `not_enforced` names the parts of the request's schemas that it
    need not keep to. `n_cut` counts the user's texts that were cut to the model's length.
    """

    id: str
    work: tuple[Work, ...]
    answer: Callable[[], WireAnswer]
    streams: bool = False
    large: bool = False
    not_enforced: tuple[str, ...] = ()
    n_cut: int = 0

    async def fold(self, events: Stream) -> dict[str, Any]:
        """Return the whole answer. Raises the error of the first request that failed, and cancels the others."""
        answer = self.answer()
        with cancelling(events):
            async for event in events:
                answer.feed(event)
        return await asyncio.to_thread(answer.response) if self.large else answer.response()

    async def chunks(self, events: Stream) -> AsyncIterator[AnswerChunk]:
        """Yield the chunks of a streamed answer. An error becomes the last chunk; Cancelled ends them without one."""
        answer = self.answer()
        try:
            for chunk in answer.begin():
                yield chunk
            async for event in events:
                for chunk in answer.feed(event):
                    yield chunk
        except Cancelled:
            return
        except Exception as error:  # noqa: BLE001 - the status line is sent; only the stream can report it
            status, body = to_error(error)
            if status >= 500:
                trace = None if isinstance(error, EngineError) else error
                _log.error("call %s failed while streaming: %s", self.id, error, exc_info=trace)
            for chunk in answer.fail(body):
                yield chunk
            return
        for chunk in answer.end():
            yield chunk
