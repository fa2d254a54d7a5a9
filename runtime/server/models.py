"""What the server says about its models: /v1/models, /health, and the counts for /metrics. Loads nothing."""

from collections.abc import Iterator
from typing import Any

from runtime.monitoring.metrics import ModelSample
from runtime.pool.pool import Fleet
from runtime.pool.slot import Host
from runtime.serving.names import Wanted


def list_models(fleet: Fleet, created_s: int) -> dict[str, Any]:
    """The body of GET /v1/models, in the order they were named, adapters beside their base."""
    return {"object": "list", "data": [_model(host, wanted, created_s) for host, wanted in fleet.served.values()]}


def show_model(fleet: Fleet, name: str, created_s: int) -> dict[str, Any]:
    """The body of GET /v1/models/{name}. Raises ModelUnknown."""
    return _model(*fleet.find(name), created_s)


def _model(host: Host, wanted: Wanted, created_s: int) -> dict[str, Any]:
    return {
        "id": wanted.id,
        "object": "model",
        "created": created_s,
        "owned_by": "deskside",
        "state": host.shown_state,
        "root": host.name,
        "parent": host.name if wanted.adapter is not None else None,
        "meta": _meta(host, wanted),
    }


def _meta(host: Host, wanted: Wanted) -> dict[str, Any]:
    """What is known: of a model that was never loaded, what its manifest and the head of its file say."""
    manifest = (wanted.adapter or wanted.base).manifest
    info, weights = host.info, wanted.base.manifest
    written = f"{host.meta.architecture}.context_length" if host.meta else ""
    description = info.description if info else ""
    return {
        "description": manifest.description if manifest else description,
        "task": manifest.task if manifest else "general",
        "labels": list(manifest.labels) if manifest else [],
        "quantization": weights.artefacts[0].quantization if weights and weights.artefacts else description,
        "n_vocab": info.n_vocab if info else host.meta.n_vocab if host.meta else None,
        "n_ctx": info.n_ctx if info else host.need.n_ctx,
        "n_ctx_train": info.n_ctx_train if info else host.meta.number(written) if host.meta else None,
        "n_params": info.n_params if info else None,
        "size": info.size_bytes if info else host.need.files,
    }


def health(fleet: Fleet) -> dict[str, Any]:
    """The body of GET /health: `ready` while some model takes requests, `live` until every engine has stopped."""
    ready = not fleet.closed and any(_takes_requests(host) for host in fleet.hosts)
    models = {host.name: _health(host) for host in fleet.hosts}
    default = fleet.find(None)[0]
    status = "ok" if ready else "draining" if fleet.closed else models[default.name]["state"]
    return {
        "status": status,
        "live": not fleet.broken,
        "ready": ready,
        "model": fleet.default,
        "running": sum(model["running"] for model in models.values()),
        "accepted": sum(model["accepted"] for model in models.values()),
        "restarts": sum(model["restarts"] for model in models.values()),
        "last_cause": fleet.last_cause or None,
        "models": models,
    }


def _takes_requests(host: Host) -> bool:
    return host.loaded.base.worker.state == "ready" if host.loaded is not None else host.state != "failed"


def _health(host: Host) -> dict[str, Any]:
    """A loaded model's state is its engine's own."""
    if host.loaded is None:
        return {"state": host.state, "running": 0, "accepted": 0, "restarts": 0, "last_cause": None, "silent_s": 0.0}
    worker = host.loaded.base.worker
    state = worker.state if host.state == "ready" else host.state
    engine = {"restarts": worker.restarts, "last_cause": worker.last_cause, "silent_s": round(worker.silent_s, 1)}
    return {"state": state, "running": worker.stats().running, "accepted": worker.live} | engine


def samples(fleet: Fleet) -> Iterator[ModelSample]:
    """Each base model's counts at this moment."""
    for host in fleet.hosts:
        worker = host.loaded.base.worker if host.loaded is not None else None
        live, stats = (worker.live, worker.stats()) if worker is not None else (0, None)
        yield ModelSample(host.name, live, stats, host.loads, host.failures, host.unloads)


def asked_model(payload: object) -> str | None:
    """The model that a body names; None if it names none, or something that its validation will refuse."""
    model = payload.get("model") if isinstance(payload, dict) else None
    return model if isinstance(model, str) else None
