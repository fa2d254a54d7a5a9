"""A batch's way into the engine: the same preparation and the same fold as the server's, without HTTP between."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import Overloaded
from runtime.openai.chat import MAX_ANSWERS_PER_CALL
from runtime.openai.wire import Endpoint, to_error
from runtime.requests import Work
from runtime.serving.chat import fold, prepare
from runtime.serving.decisions import Deciding, fold_decision, prepare_decision
from runtime.serving.embeddings import fold_embedding, prepare_embedding
from runtime.worker.inflight import Stream
from runtime.worker.supervisor import EngineSupervisor

from .lines import BatchLine


@dataclass(frozen=True, slots=True)
class Prepared:
    """A line as the engine takes it, and how its events become OpenAI's response body."""

    work: tuple[Work, ...]
    fold: Callable[[Stream], Awaitable[dict[str, Any]]]


def _text(kind: Endpoint) -> Callable[[BatchLine, Deciding], Prepared]:
    def prepared(line: BatchLine, served: Deciding) -> Prepared:
        call = prepare(kind, _with_seed(line), served)
        return Prepared(call.requests, lambda stream: fold(call, stream))

    return prepared


def _decision(line: BatchLine, served: Deciding) -> Prepared:
    call = prepare_decision(dict(line.body), served)
    return Prepared((call.scoring,), lambda stream: fold_decision(call, stream))


def _embedding(line: BatchLine, served: Deciding) -> Prepared:
    call = prepare_embedding(line.body, served)
    return Prepared((call.embedding,), lambda stream: fold_embedding(call, stream))


# url -> a line's way in: the very functions that judge and answer it over HTTP
ROUTES: Mapping[str, Callable[[BatchLine, Deciding], Prepared]] = {
    "/v1/chat/completions": _text("chat"),
    "/v1/completions": _text("completion"),
    "/v1/decisions": _decision,
    "/v1/embeddings": _embedding,
}


def queue_for(window: int) -> int:
    """How many answers must be able to wait so that a line with the most choices fits beside a window of others."""
    return window + MAX_ANSWERS_PER_CALL


class EngineAnswerer:
    """Answers batch lines through a supervisor, on the event loop that calls it."""

    def __init__(self, served: Deciding, supervisor: EngineSupervisor) -> None:
        self._served = served
        self._supervisor = supervisor
        self._ended = asyncio.Event()

    async def answer(self, line: BatchLine) -> dict[str, Any]:
        """OpenAI's response body. Cancelled, it frees what the engine holds for the line."""
        prepared = ROUTES[line.url](line, self._served)
        try:
            return await prepared.fold(await self._submit(prepared.work))
        finally:
            self._ended.set()

    async def _submit(self, work: tuple[Work, ...]) -> Stream:
        while True:
            self._ended.clear()
            try:
                return self._supervisor.submit(*work, whole=True)
            except Overloaded:
                await self._ended.wait()

    def describe(self, error: Exception) -> Mapping[str, Any]:
        """OpenAI's error object."""
        body: dict[str, Any] = to_error(error)[1]["error"]
        return body

    def require_alive(self) -> None:
        """Raise EngineDown or ShuttingDown if the supervisor takes no requests any more."""
        self._supervisor.require_room(0)


def _with_seed(line: BatchLine) -> dict[str, Any]:
    """The line's body. A seed that is not given is made from the line, so that a batch run twice answers the same."""
    if line.body.get("seed") is not None:
        return dict(line.body)
    return {**line.body, "seed": int(line.fingerprint[:15], 16)}
