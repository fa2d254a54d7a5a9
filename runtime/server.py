"""The HTTP server: OpenAI's routes and llama-server's small ones over one served model."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from .config import RuntimeConfig
from .errors import Overloaded
from .intake import Serving, prepare, require_model
from .intake_decisions import prepare_decision
from .metrics import CONTENT_TYPE, Metrics
from .openai_answer import Call
from .openai_fields import Kind
from .served import ServedModel
from .server_body import read_body, with_json
from .server_edge import Counted, add_error_table, key_check
from .server_native import apply_template, detokenize, tokenize
from .server_stream import EventStream, JsonBytes, decided, whole_answer

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class Api:
    """The handlers of one app, over one model."""

    def __init__(self, served: ServedModel, config: RuntimeConfig) -> None:
        self.metrics = Metrics(served.worker.stats, lambda: served.worker.live)
        self._served = served
        self._config = config
        self._started_s = int(time.time())
        self._preparing = 0

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._complete("chat", request)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._complete("completion", request)

    async def _complete(self, kind: Kind, request: Request) -> Response:
        self._served.worker.require_room()

        def work(payload: object) -> Call:
            return prepare(kind, payload, self._served)

        call = await self._prepared(request, work)
        stream = self._served.worker.submit(*call.requests, whole=not call.stream)
        stream.on_first_token = self.metrics.first_token
        return EventStream(call, stream) if call.stream else await whole_answer(request, call, stream)

    async def decide(self, request: Request) -> Response:
        """POST /v1/decisions"""
        self._served.worker.require_room()
        call = await self._prepared(request, lambda payload: prepare_decision(payload, self._served))
        return await decided(request, call, self._served.worker.submit(call.scoring))

    async def _prepared(self, request: Request, work: Callable[[object], T]) -> T:
        """The body, read, parsed and worked on. As many may be at it at once as the queue is long."""
        if self._preparing >= self._served.worker.capacity:
            message = f"{self._preparing} requests are being read, limit {self._served.worker.capacity}"
            raise Overloaded(message, retry_after_s=1)
        self._preparing += 1
        try:
            return await with_json(await read_body(request, self._config.max_body_bytes), work)
        finally:
            self._preparing -= 1

    def native(self, answer: Callable[[object, Serving], dict[str, Any]]) -> Handler:
        """The handler of one of llama-server's own routes."""

        async def handle(request: Request) -> Response:
            return await self._prepared(request, lambda payload: JsonBytes(answer(payload, self._served)))

        return handle

    async def models(self) -> Response:
        """GET /v1/models"""
        return JsonBytes({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/{name}"""
        require_model(name, self._served.name)
        return JsonBytes(self._model())

    def _model(self) -> dict[str, Any]:
        info, manifest = self._served.info, self._served.manifest
        meta = {
            "description": manifest.description if manifest else info.description,
            "task": manifest.task if manifest else "general",
            "labels": list(manifest.labels) if manifest else [],
            "quantization": self._served.quantization,
            "n_vocab": info.n_vocab,
            "n_ctx": info.n_ctx,
            "n_ctx_train": info.n_ctx_train,
            "n_params": info.n_params,
            "size": info.size_bytes,
        }
        model = {"id": self._served.name, "object": "model", "created": self._started_s, "owned_by": "deskside"}
        return model | {"meta": meta}

    async def health(self) -> Response:
        """GET /health and /health/ready: 200 while answers are written, else 503 (also while the engine restarts)."""
        return self._health("ready")

    async def alive(self) -> Response:
        """GET /health/live: 503 once the engine has stopped for good."""
        return self._health("live")

    def _health(self, question: str) -> Response:
        worker = self._served.worker
        answers = {"live": worker.state != "failed", "ready": worker.state == "ready"}
        stats = worker.stats()
        body: dict[str, Any] = {"status": "ok" if answers["ready"] else worker.state} | answers
        body |= {"model": self._served.name, "running": stats.running, "accepted": worker.live}
        body |= {"restarts": worker.restarts, "last_cause": worker.last_cause, "silent_s": round(worker.silent_s, 1)}
        return JsonBytes(body, 200 if answers[question] else 503)

    async def scrape(self) -> Response:
        """GET /metrics"""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)


def create_app(served: ServedModel, config: RuntimeConfig) -> FastAPI:
    """The app over `served`. Its lifespan starts and stops the worker."""
    api = Api(served, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        try:
            yield
        finally:
            served.worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    add_error_table(app)
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
    natives = {"/tokenize": tokenize, "/detokenize": detokenize, "/apply-template": apply_template}
    for path, get in gets.items():
        router.add_api_route(path, get, methods=["GET"], response_model=None)
    for path, post in posts.items():
        router.add_api_route(path, post, methods=["POST"], response_model=None)
    for path, native in natives.items():
        router.add_api_route(path, api.native(native), methods=["POST"], response_model=None)
    return router
