"""The models on the wire: /v1/models, /health, the front page, and the counts for /metrics. Never loads a model."""

import json
import shlex
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import Literal

from typing_extensions import TypedDict

from models.manifest import Manifest
from runtime.errors import InvalidRequest, TemplateFailed
from runtime.monitoring.metrics import ModelSample
from runtime.openai.tool_calls import probe, recognise
from runtime.openai.wire import answer_type
from runtime.pool.pool import ModelPool
from runtime.pool.slot import ModelSlot, SlotState
from runtime.prompt.template import ChatTemplate
from runtime.serving.names import ModelRef


@answer_type
class ModelFacts(TypedDict):
    """Facts about a model. Those that only a loaded model gives are null before its first load."""

    description: str
    task: str
    labels: list[str]
    quantization: str
    n_vocab: int | None
    n_ctx: int
    n_ctx_train: int | None
    n_params: int | None
    size: int


@answer_type
class Model(TypedDict):
    """A model, or a LoRA adapter on the model `parent`, under the name that requests give.

    `max_model_len` is the most tokens that a prompt and its answer may have together.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["deskside"]
    state: SlotState
    root: str
    parent: str | None
    capabilities: list[str]
    max_model_len: int
    meta: ModelFacts


@answer_type
class ModelList(TypedDict):
    """The models in the order they were named, adapters beside their base."""

    object: Literal["list"]
    data: list[Model]


@answer_type
class ModelHealth(TypedDict):
    """A base model's state, and the numbers of its engine."""

    state: str
    running: int
    accepted: int
    restarts: int
    last_cause: str | None
    silent_s: float


@answer_type
class Health(TypedDict):
    """`ready` while some model takes requests, `live` until every engine has stopped; `model` is the default."""

    status: str
    live: bool
    ready: bool
    model: str
    running: int
    accepted: int
    restarts: int
    last_cause: str | None
    models: dict[str, ModelHealth]


def list_models(pool: ModelPool, created_s: int) -> ModelList:
    """The body of GET /v1/models: the models in the order they were named, adapters beside their base."""
    return {"object": "list", "data": [_model(slot, ref, created_s) for slot, ref in pool.served.values()]}


def show_model(pool: ModelPool, name: str, created_s: int) -> Model:
    """The body of GET /v1/models/{name}. Raises ModelUnknown."""
    return _model(*pool.find(name), created_s)


def _model(slot: ModelSlot, ref: ModelRef, created_s: int) -> Model:
    meta = _meta(slot, ref)
    return {
        "id": ref.id,
        "object": "model",
        "created": created_s,
        "owned_by": "deskside",
        "state": slot.shown_state,
        "root": slot.name,
        "parent": slot.name if ref.adapter is not None else None,
        "capabilities": capabilities((ref.adapter or ref.base).manifest, ref.template or _template(slot)),
        "max_model_len": min(meta["n_ctx"], meta["n_ctx_train"] or meta["n_ctx"]),
        "meta": meta,
    }


def _template(slot: ModelSlot) -> str:
    """The base model's chat template, by its engine or its file's header; empty if it has none."""
    if slot.info is not None:
        return slot.info.chat_template or ""
    return slot.meta.text("tokenizer.chat_template") if slot.meta is not None else ""


def _meta(slot: ModelSlot, ref: ModelRef) -> ModelFacts:
    """The facts about a model: before its first load, those of its manifest and of its file's header."""
    manifest = (ref.adapter or ref.base).manifest
    info, weights = slot.info, ref.base.manifest
    written = f"{slot.meta.architecture}.context_length" if slot.meta else ""
    description = info.description if info else ""
    return {
        "description": manifest.description if manifest else description,
        "task": manifest.task if manifest else "general",
        "labels": list(manifest.labels) if manifest else [],
        "quantization": weights.artefacts[0].quantization if weights and weights.artefacts else description,
        "n_vocab": info.n_vocab if info else slot.meta.n_vocab if slot.meta else None,
        "n_ctx": info.n_ctx if info else slot.need.n_ctx,
        "n_ctx_train": info.n_ctx_train if info else slot.meta.number(written) if slot.meta else None,
        "n_params": info.n_params if info else None,
        "size": info.size_bytes if info else slot.need.files,
    }


def capabilities(manifest: Manifest | None, template: str) -> list[str]:
    """The endpoints and features that a model answers; `template` is its chat template, empty if it has none."""
    unlabelled = manifest is not None and manifest.fine_tuned and not manifest.labels
    return ["completion", *_of_template(template), *(() if unlabelled else ("decisions",)), "embeddings"]


@lru_cache(maxsize=64)
def _of_template(source: str) -> tuple[str, ...]:
    if not source:
        return ()
    try:
        template = ChatTemplate(source)
    except TemplateFailed:
        return ()
    return ("chat", "tools") if _calls_tools(template) else ("chat",)


def _calls_tools(template: ChatTemplate) -> bool:
    """True if the template reads tools, and writes calls in a known format."""
    if "tools" not in template.variables:
        return False
    turns, tools = probe()
    shared = {"tools": tools, "bos_token": "", "eos_token": ""}
    try:
        before = template.render({**shared, "messages": turns[:1], "add_generation_prompt": True})
        whole = template.render({**shared, "messages": turns, "add_generation_prompt": False})
    except (InvalidRequest, TemplateFailed):
        before = whole = ""
    return recognise(whole, whole.removeprefix(before.rstrip()), template.written) is not None


def health(pool: ModelPool) -> Health:
    """The body of GET /health: `ready` while some model takes requests, `live` until every engine has stopped."""
    ready = not pool.closed and any(_takes_requests(slot) for slot in pool.slots)
    models = {slot.name: _health(slot) for slot in pool.slots}
    default = pool.find(None)[0]
    status = "ok" if ready else "draining" if pool.closed else models[default.name]["state"]
    return {
        "status": status,
        "live": not pool.broken,
        "ready": ready,
        "model": pool.default,
        "running": sum(model["running"] for model in models.values()),
        "accepted": sum(model["accepted"] for model in models.values()),
        "restarts": sum(model["restarts"] for model in models.values()),
        "last_cause": pool.last_cause or None,
        "models": models,
    }


def _takes_requests(slot: ModelSlot) -> bool:
    return slot.loaded.base.supervisor.state == "ready" if slot.loaded is not None else slot.state != "failed"


def _health(slot: ModelSlot) -> ModelHealth:
    """The state and numbers of a model; a ready model's state is that of its engine."""
    if slot.loaded is None:
        return {"state": slot.state, "running": 0, "accepted": 0, "restarts": 0, "last_cause": None, "silent_s": 0.0}
    supervisor = slot.loaded.base.supervisor
    return {
        "state": supervisor.state if slot.state == "ready" else slot.state,
        "running": supervisor.stats().running,
        "accepted": supervisor.live,
        "restarts": supervisor.restarts,
        "last_cause": supervisor.last_cause,
        "silent_s": round(supervisor.silent_s, 1),
    }


def chats(slot: ModelSlot, ref: ModelRef) -> bool:
    """True if the model has a chat template."""
    return bool(ref.template or _template(slot))


def example(pool: ModelPool, url: str, *, keyed: bool) -> str:
    """A command to paste, which asks the first model. `keyed`: with the API key from the environment."""
    asked: dict[str, object] = {"model": pool.default}
    if chats(*pool.find(None)):
        path, asked["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, asked["prompt"] = "completions", "Once upon a time"
    body = shlex.quote(json.dumps(asked, ensure_ascii=False))
    key = ' -H "Authorization: Bearer $DESKSIDE_API_KEY"' if keyed else ""
    return f"curl -sS {shlex.quote(f'{url}/v1/{path}')} -H 'Content-Type: application/json'{key} -d {body}"


def front_page(pool: ModelPool, url: str, *, keyed: bool) -> str:
    """The text of GET /: the models served here, and a request to paste."""
    key = "your API key" if keyed else "any API key"
    return f"""\
Deskside {version("deskside")} serves {", ".join(pool.served)}.

OpenAI's clients take {url}/v1 as base URL, with {key}. Or paste:

{example(pool, url, keyed=keyed)}

{url}/docs      every route, to read and to try
{url}/health    whether the models take requests
{url}/metrics   counts for Prometheus
"""


def samples(pool: ModelPool) -> Iterator[ModelSample]:
    """Each base model's counts at this moment."""
    for slot in pool.slots:
        supervisor = slot.loaded.base.supervisor if slot.loaded is not None else None
        live, stats = (supervisor.live, supervisor.stats()) if supervisor is not None else (0, None)
        yield ModelSample(slot.name, live, stats, slot.loads, slot.failures, slot.unloads)
