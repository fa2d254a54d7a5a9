"""/openapi.json and /docs: the routes with the types of their bodies and answers, errors included.

The schemas are those of the models that read the bodies and of the types of the answers; the errors are the rows of
HTTP_ERRORS. The page's assets come from the package fastapi-offline: a browser loads nothing from other servers.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue
from starlette.responses import Response

from runtime.errors import Cancelled, Forbidden, Unauthorized
from runtime.openai.wire import HTTP_ERRORS, UNEXPECTED, ErrorAnswer, WireError

from .stream import JsonBytes

OPENAPI_PATH, PAGE_PATH = DOCS_PATHS = ("/openapi.json", "/docs")
_ASSETS = "docs/assets"
_REFERENCE = "#/components/schemas/"
# Cancelled is absent: a client that left gets no answer. Who may ask depends on the configuration.
ERRORS_OF_A_BODY = tuple(error for error in HTTP_ERRORS if error not in (Cancelled, Unauthorized, Forbidden))


Errors = tuple[type[Exception], ...]
"""Rows of HTTP_ERRORS."""


@dataclass(frozen=True, slots=True)
class Operation:
    """The description of a route. `body` None: it takes none; `answer` None: it answers plain text.

    `chunk` is the type of the data of each server-sent event, where an answer can be streamed. `statuses` are those
    with which the answer is sent.
    """

    tag: str
    summary: str
    answer: Any
    body: Any = None
    chunk: Any = None
    errors: Errors = ()
    statuses: Mapping[int, str] = field(default_factory=lambda: {200: "The answer."})


def add_docs(app: FastAPI, operations: Mapping[tuple[str, str], Operation]) -> None:
    """Serve the document of `operations`, by path and method, and a page that shows it."""
    made: list[Response] = []

    async def show_document() -> Response:
        if not made:  # once, in a thread: it takes a few tenths of a second
            made.append(await asyncio.to_thread(lambda: JsonBytes(document(app, operations))))
        return made[0]

    async def show_page() -> Response:
        # Relative, so that the page works behind a proxy that serves it under a prefix.
        return get_swagger_ui_html(
            openapi_url=OPENAPI_PATH.removeprefix("/"),
            title=app.title,
            swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{_ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{_ASSETS}/favicon.png",
            swagger_ui_parameters={"validatorUrl": None},
        )

    app.add_api_route(OPENAPI_PATH, show_document, methods=["GET"], include_in_schema=False)
    app.add_api_route(PAGE_PATH, show_page, methods=["GET"], include_in_schema=False)
    app.mount(f"/{_ASSETS}", StaticFiles(directory=str(resources.files("fastapi_offline") / "static")))


def document(app: FastAPI, operations: Mapping[tuple[str, str], Operation]) -> dict[str, Any]:
    """The OpenAPI document of the app's routes."""
    described = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    refs, schemas = _schemas(operations.values())
    for (path, method), operation in operations.items():
        entry = described["paths"][path.replace(":path", "")][method]
        entry.pop("description", None)
        entry |= {"summary": operation.summary, "responses": _responses(operation, refs)}
        if operation.body is not None:
            entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[operation.body]}}}
    used = _reachable(described["paths"], schemas)
    described.setdefault("components", {})["schemas"] = {name: schemas[name] for name in sorted(used)}
    return described


def _schemas(operations: Iterable[Operation]) -> tuple[dict[Any, JsonSchemaValue], dict[str, JsonSchemaValue]]:
    """A reference for each type of the operations, and the schemas by name."""
    kinds = dict.fromkeys([ErrorAnswer, *(kind for one in operations for kind in (one.body, one.answer, one.chunk))])
    inputs: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = [
        (kind, "validation", TypeAdapter(kind)) for kind in kinds if kind is not None
    ]
    found, defined = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE + "{model}")
    return {kind: schema for (kind, _), schema in found.items()}, defined["$defs"]


def _reachable(value: object, schemas: Mapping[str, JsonSchemaValue]) -> set[str]:
    """The names of the schemas that `value` refers to, directly or through others."""
    names: set[str] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
        elif isinstance(part, str) and part.startswith(_REFERENCE):
            name = part.removeprefix(_REFERENCE)
            if name not in names:
                names.add(name)
                waiting.append(schemas[name])
    return names


def _responses(operation: Operation, refs: Mapping[Any, JsonSchemaValue]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {"application/json": {"schema": refs[operation.answer]}}
    if operation.chunk is not None:
        data = {"anyOf": [refs[operation.chunk], refs[ErrorAnswer], {"const": "[DONE]"}]}
        content["text/event-stream"] = {"schema": data | {"description": "The data of each event."}}
    responses: dict[str, Any] = {
        str(status): {"description": text, "content": content} for status, text in operation.statuses.items()
    }
    by_status: dict[int, list[str]] = {}
    for wire, meaning in _meanings(operation.errors):
        by_status.setdefault(wire.status, []).append(f"`{wire.code or wire.type}`: {meaning}")
    for status, lines in sorted(by_status.items()):
        described: dict[str, Any] = {"description": "\n".join(f"- {line}" for line in lines)}
        if status in (429, 503):
            described["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
        described["content"] = {"application/json": {"schema": refs[ErrorAnswer]}}
        responses[str(status)] = described
    return responses


def _meanings(errors: Iterable[type[Exception]]) -> Iterable[tuple[WireError, str]]:
    for error in errors:
        yield HTTP_ERRORS[error], (error.__doc__ or "").partition("\n")[0]
    yield UNEXPECTED, "A fault of the server."
