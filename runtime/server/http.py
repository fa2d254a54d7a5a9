"""HTTP middleware: errors, API key, metrics, resources held per request; and the bodies of requests."""

import asyncio
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import (
    BodyTooLarge,
    BodyTooSlow,
    Cancelled,
    EngineError,
    InvalidRequest,
    NoRoom,
    Overloaded,
    RequestError,
    Unauthorized,
)
from runtime.monitoring.metrics import Metrics
from runtime.openai.wire import error_body, parse_strict_json, require_characters, to_error

from .stream import JsonBytes

_log = logging.getLogger("deskside.server")


def error_response(error: Exception) -> Response:
    """The response of HTTP_ERRORS to an error, with Retry-After where waiting helps."""
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
    """Answer every error of `app` in OpenAI's shape."""
    app.add_exception_handler(RequestError, _ours)
    app.add_exception_handler(EngineError, _ours)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(Exception, _unexpected)


def key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    """A dependency that admits only requests which carry `api_key` as bearer token."""
    bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> None:
        token = given.credentials.strip() if given is not None else ""
        if not hmac.compare_digest(token.encode(), api_key.encode()):
            raise Unauthorized("this server wants its API key: send the header 'Authorization: Bearer KEY'")

    return check


class Counted:
    """Counts and times each request by its route; requests without a route count as `unknown`."""

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
    """Gives each exchange a stack of resources, which are released after the answer, whatever its outcome."""

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


# Larger bodies are parsed, rendered and tokenised in a thread, so as not to block the event loop.
INLINE_BYTES = 8 << 10
# So are bodies with a grammar: it is compiled, and the first one waits for llguidance to read the vocabulary.
NAMES_GRAMMAR = re.compile(rb'"(response_format|grammar|regex|choice|tools|format)"')
MAX_OBJECT_FIELDS = 4096
# The number of bodies read at once is bounded: a client that never ends its own must not keep a place.
READ_SECONDS = 60.0

T = TypeVar("T")


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Read the whole body.

    Raises BodyTooLarge as soon as it is known to exceed the limit, BodyTooSlow, or Cancelled if the client left.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise BodyTooLarge(f"the body has {declared} bytes, limit {limit_bytes}")
    body = bytearray()
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise BodyTooLarge(f"the body has more than {limit_bytes} bytes, the limit")
    except TimeoutError:
        raise BodyTooSlow(f"{len(body)} bytes of the body came in {READ_SECONDS:g} s, the limit") from None
    except ClientDisconnect:
        raise Cancelled("the client left before its request was whole") from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Parse strict JSON in UTF-8. Raises InvalidRequest, also for NaN and lone surrogates."""
    try:
        text = body.decode("utf-8")
        value = parse_strict_json(text, object_pairs_hook=_bounded_object)
        require_characters(body, value)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} cannot be decoded") from None
    except RecursionError:
        raise InvalidRequest("the body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # malformed, or a number of more digits than Python reads
        raise InvalidRequest(f"the body is not valid JSON: {str(error)[:200]}") from None
    return value


def _bounded_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Validation would make one error per unknown field: slow, and large.
    if len(pairs) > MAX_OBJECT_FIELDS:
        raise InvalidRequest(f"the body holds an object of {len(pairs)} fields, limit {MAX_OBJECT_FIELDS}")
    return dict(pairs)


def asked_model(payload: object) -> str | None:
    """The model that a body names; None if it names none, or holds something that validation will refuse."""
    model = payload.get("model") if isinstance(payload, dict) else None
    return model if isinstance(model, str) else None


async def off_loop(body: bytes, work: Callable[[], T]) -> T:
    """Run `work`, whose time depends on `body`; in a thread if the body is large or names a grammar."""
    takes_long = len(body) > INLINE_BYTES or NAMES_GRAMMAR.search(body)
    return await asyncio.to_thread(work) if takes_long else work()
