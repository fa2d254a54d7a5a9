"""The models on the wire: /v1/models, /health, and the counts for /metrics. Loads nothing."""

from collections.abc import Iterator
from typing import Any

from runtime.monitoring.metrics import ModelSample
from runtime.pool.pool import ModelPool
from runtime.pool.slot import ModelSlot
from runtime.serving.names import ModelRef


def list_models(pool: ModelPool, created_s: int) -> dict[str, Any]:
    """The body of GET /v1/models, in the order they were named, adapters beside their base."""
    return {"object": "list", "data": [_model(slot, ref, created_s) for slot, ref in pool.served.values()]}


def show_model(pool: ModelPool, name: str, created_s: int) -> dict[str, Any]:
    """The body of GET /v1/models/{name}. Raises ModelUnknown."""
    return _model(*pool.find(name), created_s)


def _model(slot: ModelSlot, ref: ModelRef, created_s: int) -> dict[str, Any]:
    return {
        "id": ref.id,
        "object": "model",
        "created": created_s,
        "owned_by": "deskside",
        "state": slot.shown_state,
        "root": slot.name,
        "parent": slot.name if ref.adapter is not None else None,
        "meta": _meta(slot, ref),
    }


def _meta(slot: ModelSlot, ref: ModelRef) -> dict[str, Any]:
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


def health(pool: ModelPool) -> dict[str, Any]:
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


def _health(slot: ModelSlot) -> dict[str, Any]:
    """A loaded model's state is its engine's own."""
    if slot.loaded is None:
        return {"state": slot.state, "running": 0, "accepted": 0, "restarts": 0, "last_cause": None, "silent_s": 0.0}
    supervisor = slot.loaded.base.supervisor
    state = supervisor.state if slot.state == "ready" else slot.state
    engine = {
        "restarts": supervisor.restarts,
        "last_cause": supervisor.last_cause,
        "silent_s": round(supervisor.silent_s, 1),
    }
    return {"state": state, "running": supervisor.stats().running, "accepted": supervisor.live} | engine


def samples(pool: ModelPool) -> Iterator[ModelSample]:
    """Each base model's counts at this moment."""
    for slot in pool.slots:
        supervisor = slot.loaded.base.supervisor if slot.loaded is not None else None
        live, stats = (supervisor.live, supervisor.stats()) if supervisor is not None else (0, None)
        yield ModelSample(slot.name, live, stats, slot.loads, slot.failures, slot.unloads)
