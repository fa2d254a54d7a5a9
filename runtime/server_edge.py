"""What every HTTP exchange passes: the error table, the API key, the count of requests, and what is held meanwhile."""

import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import EngineError, NoRoom, Overloaded, RequestError, Unauthorized
from .metrics import Metrics
from .openai_error import error_body, to_error
from .server_stream import JsonBytes

_log = logging.getLogger("deskside.server")


def error_response(error: Exception) -> Response:
    """An error as the table says, with Retry-After where waiting helps."""
    status, body = to_error(error)
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, Overloaded | NoRoom) else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JsonBytes(body, status, headers)


async def _ours(request: Request, error: Exception) -> Response:
    response = error_response(error)
    if response.status_code >= 500:
        _log.error("%s %s failed: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return response


async def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, and the server logs it.
    return error_response(error)


async def _routing(request: Request, error: Exception) -> Response:
    """404 and 405 of the router itself, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]!r}"
    messages = {404: f"there is no {where} here", 405: f"{where} is not allowed; see the Allow header"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = messages.get(error.status_code, str(error.detail))
    body = error_body(message, "invalid_request_error", None, codes.get(error.status_code))
    return JsonBytes(body, error.status_code, dict(error.headers or {}))


def add_error_table(app: FastAPI) -> None:
    """Let every error leave `app` in OpenAI's shape."""
    app.add_exception_handler(RequestError, _ours)
    app.add_exception_handler(EngineError, _ours)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(Exception, _unexpected)


def key_check(api_key: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency that lets pass only requests which carry `api_key` as bearer token; an empty key lets all pass."""

    async def check(request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(token.strip().encode(), api_key.encode())
        if api_key and not (scheme.lower() == "bearer" and matches):
            raise Unauthorized("this server wants its API key: send the header 'Authorization: Bearer KEY'")

    return check


class Counted:
    """Counts and times each request by its route; whatever is routed nowhere counts as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.monotonic(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.request_ended(route, status, time.monotonic() - started_s)


EXCHANGE = "deskside.exchange"


class Holding:
    """Gives each exchange a stack of what it holds; all of it is let go once the answer is out, however it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as held:
            scope[EXCHANGE] = held
            await self._app(scope, receive, send)


def held_by(request: Request) -> AsyncExitStack:
    """The stack of the exchange that `request` is part of."""
    stack: AsyncExitStack = request.scope[EXCHANGE]
    return stack
