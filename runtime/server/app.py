"""The HTTP server: OpenAI's routes and llama-server's small ones over a pool of models."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from runtime.config import RuntimeConfig
from runtime.errors import Overloaded
from runtime.monitoring.metrics import CONTENT_TYPE, Metrics
from runtime.openai.answer import Call
from runtime.openai.wire import Endpoint
from runtime.pool.pool import ModelPool
from runtime.serving.chat import Serving, prepare, prepare_response
from runtime.serving.decisions import prepare_decision
from runtime.serving.embeddings import prepare_embedding
from runtime.serving.model import ServedModel

from .http import Counted, Holding, add_error_table, held_by, key_check, off_loop, parse_json, read_body
from .models import asked_model, health, list_models, samples, show_model
from .native import apply_template, detokenize, tokenize
from .stream import EventStream, JsonBytes, decided, embedded, responded, whole_answer

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

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._complete("chat", request)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._complete("completion", request)

    async def _complete(self, kind: Endpoint, request: Request) -> Response:
        def work(payload: object, served: ServedModel) -> Call:
            return prepare(kind, payload, served)

        call, served = await self._prepared(request, work)
        stream = served.supervisor.submit(*call.requests, whole=not call.stream)
        stream.on_first_token = self.metrics.first_token
        return EventStream(call, stream) if call.stream else await whole_answer(request, call, stream)

    async def decide(self, request: Request) -> Response:
        """POST /v1/decisions"""
        call, served = await self._prepared(request, prepare_decision)
        return await decided(request, call, served.supervisor.submit(call.scoring))

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        call, served = await self._prepared(request, prepare_embedding)
        return await embedded(request, call, served.supervisor.submit(call.embedding))

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses"""
        call, served = await self._prepared(request, prepare_response)
        stream = served.supervisor.submit(*call.call.requests, whole=not call.call.stream)
        stream.on_first_token = self.metrics.first_token
        return await responded(request, call, stream)

    async def _prepared(
        self, request: Request, work: Callable[[object, ServedModel], T], *, needs_room: bool = True
    ) -> tuple[T, ServedModel]:
        """The body, read, parsed and worked on, and the model it asks for, which is held until the answer is out.

        `needs_room`: refuse at once, before any work, what its engine would not accept.
        """
        self._pool.require_open()
        with self._one_at_work():
            body = await read_body(request, self._config.max_body_bytes)
            payload = await off_loop(body, lambda: parse_json(body))
        served = await held_by(request).enter_async_context(self._pool.lease(asked_model(payload)))
        if needs_room:
            served.supervisor.require_room()
        with self._one_at_work():
            return await off_loop(body, lambda: work(payload, served)), served

    @contextmanager
    def _one_at_work(self) -> Iterator[None]:
        """As many requests may be read or prepared at once as a queue is long; loads are waited for outside."""
        limit = self._pool.options.capacity
        if self._at_work >= limit:
            raise Overloaded(f"{self._at_work} requests are being read, limit {limit}", retry_after_s=1)
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    def native(self, answer: Callable[[object, Serving], dict[str, Any]]) -> Handler:
        """The handler of one of llama-server's own routes."""

        async def handle(request: Request) -> Response:
            response, _ = await self._prepared(request, lambda *asked: JsonBytes(answer(*asked)), needs_room=False)
            return response

        return handle

    async def models(self) -> Response:
        """GET /v1/models"""
        return JsonBytes(list_models(self._pool, self._started_s))

    async def model(self, name: str) -> Response:
        """GET /v1/models/{name}"""
        return JsonBytes(show_model(self._pool, name, self._started_s))

    async def health(self) -> Response:
        """GET /health and /health/ready: 200 while requests are taken, else 503."""
        body = health(self._pool)
        return JsonBytes(body, 200 if body["ready"] else 503)

    async def alive(self) -> Response:
        """GET /health/live: 503 once the engines have stopped for good."""
        body = health(self._pool)
        return JsonBytes(body, 200 if body["live"] else 503)

    async def scrape(self) -> Response:
        """GET /metrics"""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)


def create_app(pool: ModelPool, config: RuntimeConfig) -> FastAPI:
    """The app over `pool`. Its lifespan is that of the pool's engines."""
    api = Api(pool, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with pool.running():
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    add_error_table(app)
    app.add_middleware(Holding)
    app.add_middleware(Counted, metrics=api.metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.include_router(_open_routes(api))
    app.include_router(_keyed_routes(api), dependencies=[Depends(key_check(config.api_key))])
    return app


def _open_routes(api: Api) -> APIRouter:
    router = APIRouter()
    for path, handler in {"/health": api.health, "/health/ready": api.health, "/health/live": api.alive}.items():
        router.add_api_route(path, handler, methods=["GET"], response_model=None)
    return router


def _keyed_routes(api: Api) -> APIRouter:
    router = APIRouter()
    gets: dict[str, Callable[..., Awaitable[Response]]] = {
        "/v1/models": api.models,
        "/v1/models/{name:path}": api.model,
        "/metrics": api.scrape,
    }
    posts = {"/v1/chat/completions": api.chat, "/v1/completions": api.completion, "/v1/decisions": api.decide}
    posts["/v1/embeddings"] = api.embed
    posts["/v1/responses"] = api.respond
    natives = {"/tokenize": tokenize, "/detokenize": detokenize, "/apply-template": apply_template}
    for path, get in gets.items():
        router.add_api_route(path, get, methods=["GET"], response_model=None)
    for path, post in posts.items():
        router.add_api_route(path, post, methods=["POST"], response_model=None)
    for path, native in natives.items():
        router.add_api_route(path, api.native(native), methods=["POST"], response_model=None)
    return router
