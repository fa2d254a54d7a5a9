"""HTTP middleware: errors, API key, metrics, resources held per request; and the bodies of requests."""

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import time
import zlib
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.config import RuntimeConfig
from runtime.errors import (
    BodyTooLarge,
    BodyTooSlow,
    Cancelled,
    EngineError,
    Forbidden,
    InvalidRequest,
    NoRoom,
    Overloaded,
    RequestError,
    Unauthorized,
    UnsupportedMedia,
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
    # Starlette raises the error again after this answer; the server logs it, and closes the connection.
    response = error_response(error)
    response.headers["connection"] = "close"
    return response


async def _routing(request: Request, error: Exception) -> Response:
    """404 and 405 of the router itself, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]!r}"
    base = f"OpenAI's clients take {str(request.base_url)[:200]}v1 as base URL, and GET / says what there is"
    messages = {404: f"there is no {where} here; {base}", 405: f"{where} is not allowed; see the Allow header"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = messages.get(error.status_code, str(error.detail))
    body = error_body(message, "invalid_request_error", None, codes.get(error.status_code))
    headers = {name: "GET, HEAD" if value == "GET" else value for name, value in (error.headers or {}).items()}
    return JsonBytes(body, error.status_code, headers)


def add_error_table(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape."""
    app.add_exception_handler(RequestError, _ours)
    app.add_exception_handler(EngineError, _ours)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(Exception, _unexpected)


def key_check(api_key: str) -> Callable[..., Awaitable[None]]:
    """A dependency that admits only requests which carry `api_key` as bearer token, or as other APIs take theirs."""
    bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey")
    anthropic = APIKeyHeader(name="x-api-key", auto_error=False, scheme_name="XApiKey")
    azure = APIKeyHeader(name="api-key", auto_error=False, scheme_name="AzureApiKey")

    async def check(
        token: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
        x_api_key: Annotated[str | None, Security(anthropic)],
        azure_key: Annotated[str | None, Security(azure)],
    ) -> None:
        given = [token.credentials if token is not None else "", x_api_key or "", azure_key or ""]
        if not any(hmac.compare_digest(key.strip().encode(), api_key.encode()) for key in given):
            raise Unauthorized("this server wants its API key: send the header 'Authorization: Bearer KEY'")

    return check


class NearPaths:
    """Takes the path of a request for the route that was meant, and HEAD for GET without the body.

    Clients join base URL and path in their own ways: without /v1, with two of it, with slashes to spare.
    """

    def __init__(self, app: ASGIApp, known: Collection[str]) -> None:
        self._app = app
        self._known = frozenset(known)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # A copy: uvicorn leaves out the body by the method in its own.
            scope = {**scope, "path": self.meant(scope["path"])}
            scope["method"] = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._app(scope, receive, send)

    def meant(self, path: str) -> str:
        """The path of a route for one that is nearly it."""
        if path in self._known:
            return path
        if named := re.fullmatch(r"/*(?:v1/+)*models/+(.+?)/*", path):
            return f"/v1/models/{named[1]}"
        plain = re.sub(r"/+", "/", path).rstrip("/")
        while plain.startswith("/v1/v1/"):
            plain = plain.removeprefix("/v1")
        candidates = (plain or "/", f"/v1{plain}", plain.removeprefix("/v1") or "/")
        return next((candidate for candidate in candidates if candidate in self._known), path)


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
    """Gives each exchange a stack of resources, which are released after the answer, on every outcome."""

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
NAMES_GRAMMAR = re.compile(rb'"(response_format|grammar|regex|choice|tools|format|structured_outputs|guided_[a-z]+)"')
MAX_OBJECT_FIELDS = 4096
ENCODINGS = ("identity", "gzip", "x-gzip", "deflate")
# The number of bodies read at once is bounded: a client that never ends its own must not keep a place.
READ_SECONDS = 60.0

T = TypeVar("T")


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Read the whole body, unpacked.

    Raises BodyTooLarge as soon as it is known to exceed the limit, BodyTooSlow, UnsupportedMedia for an encoding that
    is none of gzip and deflate, InvalidRequest for one that is broken, or Cancelled if the client left.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ENCODINGS:
        raise UnsupportedMedia(f"a body may be packed by {', '.join(ENCODINGS[1:])}, not {encoding[:100]!r}")
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
    return bytes(body) if encoding == "identity" else await asyncio.to_thread(unpack, bytes(body), limit_bytes)


def unpack(packed: bytes, limit_bytes: int) -> bytes:
    """Undo gzip or deflate. Raises BodyTooLarge before more than the limit is unpacked, InvalidRequest."""
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)  # by the header, either of the two
    try:
        body = unpacking.decompress(packed, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not packed as its Content-Encoding says: {error}") from None
    if len(body) > limit_bytes:
        raise BodyTooLarge(f"the body has more than {limit_bytes} bytes unpacked, the limit")
    if not unpacking.eof or unpacking.unused_data:
        raise InvalidRequest("the packed body ends too early" if not unpacking.eof else "bytes follow the packed body")
    return body


def parse_json(body: bytes) -> Any:
    """Parse strict JSON in UTF-8. Raises InvalidRequest, also for NaN and lone surrogates."""
    try:
        text = body.decode("utf-8-sig")  # some tools write a byte order mark
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
    """Run `work`, which takes time in proportion to `body`; in a thread if the body is large or names a grammar."""
    takes_long = len(body) > INLINE_BYTES or NAMES_GRAMMAR.search(body)
    return await asyncio.to_thread(work) if takes_long else work()


_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)
# Names that no public DNS server can be asked for: of containers, and of a company's own network.
_PRIVATE_NAME = re.compile(r"[a-z0-9_-]+|[a-z0-9_.-]+\.internal")


def require_json(http: Request) -> None:
    """Raise UnsupportedMedia unless the body is declared as JSON."""
    declared = http.headers.get("content-type", "")
    if not _JSON.fullmatch(declared.partition(";")[0].strip()):
        given = f"not {declared[:100]!r}" if declared else "and the request has none"
        raise UnsupportedMedia(f"a body needs the header 'Content-Type: application/json', {given}")


class Guard:
    """Refuses requests for a host that is not this server, and those of pages of other sites.

    An API key makes it superfluous: a page does not know the key.
    """

    def __init__(self, app: ASGIApp, config: RuntimeConfig) -> None:
        self._app = app
        self._allowed = tuple(host_name(name) for name in config.allowed_hosts)
        self._origins = {origin.strip().lower().rstrip("/") for origin in config.cors_origins}
        self._own = {"localhost", config.bind.lower()}
        self._on_a_network = not _is_loopback(config.bind)
        if self._on_a_network:
            own = socket.gethostname().lower()
            self._own |= {own, f"{own}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(Headers(scope=scope))
            except Forbidden as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def check(self, headers: Headers) -> None:
        """Raise Forbidden for a foreign `Host` or `Origin`. HTTP/1.0 knows no Host, and no browser speaks it."""
        for host in headers.getlist("host"):
            name = host_name(host)
            if not self._is_ours(name):
                raise Forbidden(
                    f"this server is not known as {host[:200]!r}; if that is its name, start it with "
                    f"--allowed-hosts {name[:200] or 'NAME'} (DESKSIDE_ALLOWED_HOSTS)",
                    code="host_not_allowed",
                )
        for origin in headers.getlist("origin"):
            if not self._may_ask(origin.strip().lower(), headers.get("host", "").strip().lower()):
                raise Forbidden(
                    f"pages of {origin[:200]!r} may not use this server; to let them, start it with "
                    f"--cors-origins {origin[:200]} (DESKSIDE_CORS_ORIGINS)",
                    code="origin_not_allowed",
                )

    def _is_ours(self, name: str) -> bool:
        if name in self._own or name.endswith(".localhost") or self._is_allowed(name):
            return True
        # A page that was rebound has a public name, and never an address.
        return _is_address(name) or (self._on_a_network and _PRIVATE_NAME.fullmatch(name) is not None)

    def _is_allowed(self, name: str) -> bool:
        return any(
            allowed == "*" or name == allowed or (allowed.startswith("*.") and name.endswith(allowed[1:]))
            for allowed in self._allowed
        )

    def _may_ask(self, origin: str, host: str) -> bool:
        """True for the server's own pages, pages of an allowed site, and origins other than pages: extensions, apps."""
        if origin in self._origins or "*" in self._origins:
            return True
        scheme, colon, _ = origin.partition("://")
        if colon and scheme not in ("http", "https"):
            return True
        site = origin.removeprefix(f"{scheme}://") if colon else ""
        return bool(site) and (site == host or (self._is_allowed(host_name(site)) and "*" not in self._allowed))


def host_name(host: str) -> str:
    """The name in a `Host` header: without port, brackets and final dot, in lower case; "" if it holds none."""
    try:
        return (urlsplit(f"//{host.strip()}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(bind: str) -> bool:
    return bind.lower() == "localhost" or (_is_address(bind) and ipaddress.ip_address(bind).is_loopback)
