"""The HTTP server: OpenAI's routes and llama-server's small ones over a pool of models."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from runtime.config import RuntimeConfig
from runtime.errors import Forbidden, ModelUnknown, Overloaded, Unauthorized
from runtime.monitoring.metrics import CONTENT_TYPE, Metrics
from runtime.pool.pool import ModelPool
from runtime.serving.model import ServedModel
from runtime.serving.routes import ROUTES, Prepare

from .http import (
    Counted,
    Guard,
    Holding,
    NearPaths,
    add_error_table,
    asked_model,
    held_by,
    key_check,
    off_loop,
    parse_json,
    read_body,
    require_json,
)
from .models import Health, Model, ModelList, front_page, health, list_models, samples, show_model
from .native import NATIVE_ROUTES
from .openapi import DOCS_PATHS, ERRORS_OF_A_BODY, Errors, Operation, add_docs
from .stream import JsonBytes, respond

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class Api:
    """The handlers of one app, over the models of one pool."""

    def __init__(self, pool: ModelPool, config: RuntimeConfig) -> None:
        self.metrics = Metrics(lambda: samples(pool))
        self._pool = pool
        self._config = config
        self._started_s = int(time.time())
        self._at_work = 0

    def answering(self, prepare: Prepare) -> Handler:
        """The handler of an endpoint that a model answers through its engine."""

        async def handle(http: Request) -> Response:
            call, model = await self._prepared(http, prepare)
            events = model.supervisor.submit(*call.work, whole=not call.streams)
            events.on_first_token = self.metrics.first_token
            self.metrics.texts_cut(model.name, call.n_cut)
            return await respond(http, call, events)

        return handle

    def native(self, answer: Callable[[object, ServedModel], Any]) -> Handler:
        """The handler of one of llama-server's own routes, which need no engine."""

        async def handle(http: Request) -> Response:
            response, _ = await self._prepared(http, lambda *asked: JsonBytes(answer(*asked)), needs_room=False)
            return response

        return handle

    async def _prepared(
        self, http: Request, prepare: Callable[[object, ServedModel], T], *, needs_room: bool = True
    ) -> tuple[T, ServedModel]:
        """Read, parse and prepare the body, and lease the model that it asks for until the answer is out.

        `needs_room`: refuse before any preparation what the model's engine would not accept.
        """
        self._pool.require_open()
        require_json(http)
        with self._one_at_work() as waiting:
            body = await read_body(http, self._config.max_body_bytes)
            payload = await off_loop(body, lambda: parse_json(body))
            with waiting():
                model = await held_by(http).enter_async_context(self._pool.lease(asked_model(payload)))
            if needs_room:
                model.supervisor.require_room()
            return await off_loop(body, lambda: prepare(payload, model)), model

    @contextmanager
    def _one_at_work(self) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Admit at most `capacity` requests to reading and preparation; waiting for a model to load does not count.

        Raises Overloaded. Yields the context to wait in.
        """
        limit = self._pool.options.capacity
        if self._at_work >= limit:
            raise Overloaded(f"{self._at_work} requests are being read, limit {limit}", retry_after_s=1)

        @contextmanager
        def waiting() -> Iterator[None]:
            self._at_work -= 1
            try:
                yield
            finally:
                self._at_work += 1

        self._at_work += 1
        try:
            yield waiting
        finally:
            self._at_work -= 1

    async def models(self) -> Response:
        """GET /v1/models."""
        return JsonBytes(list_models(self._pool, self._started_s))

    async def model(self, name: str) -> Response:
        """GET /v1/models/{name}."""
        return JsonBytes(show_model(self._pool, name, self._started_s))

    async def front(self, http: Request) -> Response:
        """GET /."""
        url = str(http.base_url).rstrip("/")
        text = await asyncio.to_thread(front_page, self._pool, url, keyed=bool(self._config.api_key))
        return PlainTextResponse(text)

    async def health(self) -> Response:
        """GET /health and /health/ready: 200 while some model takes requests, else 503."""
        body = health(self._pool)
        return JsonBytes(body, 200 if body["ready"] else 503)

    async def alive(self) -> Response:
        """GET /health/live: 503 once the engines have stopped for good."""
        body = health(self._pool)
        return JsonBytes(body, 200 if body["live"] else 503)

    async def scrape(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)


Row = tuple[Callable[..., Awaitable[Response]], Operation]
"""A handler, and its description."""


def create_app(pool: ModelPool, config: RuntimeConfig) -> FastAPI:
    """The app over `pool`. Its lifespan is that of the pool's engines."""
    api = Api(pool, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with pool.running():
            yield

    # The document and its page are our own: FastAPI would make the document on the event loop, and fetch the page's
    # assets from elsewhere.
    app = FastAPI(
        title="Deskside",
        description="A fine-tuned small model behind OpenAI's API.",
        version=version("deskside"),
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
    )
    add_error_table(app)
    app.add_middleware(Holding)
    if not config.api_key:
        app.add_middleware(Guard, config=config)
    app.add_middleware(Counted, metrics=api.metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    keyed = [Depends(key_check(config.api_key))] if config.api_key else []
    errors = (Unauthorized,) if config.api_key else (Forbidden,)
    operations: dict[tuple[str, str], Operation] = {}
    for method, rows, dependencies in (
        ("GET", _open_gets(api, () if config.api_key else (Forbidden,)), []),
        ("GET", _keyed_gets(api, errors), keyed),
        ("POST", _keyed_posts(api, errors), keyed),
    ):
        for path, (handler, operation) in rows.items():
            app.add_api_route(
                path, handler, methods=[method], response_model=None, dependencies=dependencies, tags=[operation.tag]
            )
            operations[path, method.lower()] = operation
    add_docs(app, operations)
    app.add_middleware(NearPaths, known=[*(path for path, _ in operations), *DOCS_PATHS])
    return app


def _open_gets(api: Api, errors: Errors) -> dict[str, Row]:
    statuses = {200: "Some model takes requests.", 503: "No model takes requests."}
    ready = Operation("server", "Ready for requests?", Health, errors=errors, statuses=statuses)
    statuses = {200: "Some engine runs, or can be started.", 503: "Every engine has stopped for good."}
    alive = Operation("server", "Alive?", Health, errors=errors, statuses=statuses)
    front = Operation("server", "How to ask the models", None, errors=errors)
    return {
        "/": (api.front, front),
        "/health": (api.health, ready),
        "/health/ready": (api.health, ready),
        "/health/live": (api.alive, alive),
    }


def _keyed_gets(api: Api, errors: Errors) -> dict[str, Row]:
    return {
        "/v1/models": (api.models, Operation("models", "List the models", ModelList, errors=errors)),
        "/v1/models/{name:path}": (
            api.model,
            Operation("models", "Show a model", Model, errors=(*errors, ModelUnknown)),
        ),
        "/metrics": (api.scrape, Operation("server", "Prometheus metrics", None, errors=errors)),
    }


def _keyed_posts(api: Api, errors: Errors) -> dict[str, Row]:
    errors = (*errors, *ERRORS_OF_A_BODY)
    posts: dict[str, Row] = {}
    for path, route in ROUTES.items():
        operation = Operation("answers", route.summary, route.answer, route.body, route.chunk, errors)
        posts[path] = (api.answering(route.prepare), operation)
    for path, native in NATIVE_ROUTES.items():
        operation = Operation("prompts", native.summary, native.answered, native.body, errors=errors)
        posts[path] = (api.native(native.answer), operation)
    return posts
