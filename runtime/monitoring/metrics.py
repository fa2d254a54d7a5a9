"""Prometheus metrics of one app, in a registry of its own, so that two apps in one process do not mix."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.requests import EngineStats

# The format of `generate_latest`, underscores in place of other characters in names.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_GAUGES = {
    "running": "Answers being written",
    "waiting": "Answers waiting for a slot in the engine",
    "kv_cells_used": "KV cache cells in use",
    "kv_cells_total": "KV cache cells in total",
    "snapshot_bytes": "Memory of prefixes that left the KV cache",
}
_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens of all answers",
    "cached_tokens_total": "Prompt tokens taken from the KV cache",
    "generated_tokens_total": "Tokens generated",
    "steps_total": "Engine steps",
    "preemptions_total": "Sequences preempted because the KV cache was full",
    "draft_tokens_total": "Speculative tokens that were verified",
    "draft_tokens_accepted_total": "Speculative tokens that were accepted",
    "decode_seconds_total": "Seconds inside the model's decode",
    "step_seconds_total": "Seconds inside engine steps: decode, planning, sampling and emitting",
    "snapshots_restored_total": "Prefixes put back into the KV cache, from memory or disk",
    "disk_prefixes_written_total": "Prefixes written to disk",
    "disk_prefixes_loaded_total": "Prefixes read from disk",
    "disk_prefixes_dropped_total": "Prefixes that could not be written to disk in time, or at all",
    "disk_prefixes_damaged_total": "Damaged prefixes on disk, ignored and deleted",
    "engine_restarts_total": "Restarts of the engine's process",
}
_MODEL_COUNTERS = {
    "loads": "Times the model was loaded",
    "load_failures": "Times the model could not be loaded, or its engine stopped",
    "unloads": "Times the model was unloaded",
}


@dataclass(frozen=True, slots=True)
class ModelSample:
    """A model at the moment of a scrape. `stats` is None while it is not loaded; a reloaded engine counts from 0.

    `live` counts accepted answers that have not ended.
    """

    model: str
    live: int
    stats: EngineStats | None
    loads: int = 1
    load_failures: int = 0
    unloads: int = 0


class _EngineCollector(Collector):
    """Reads the engines' counters at each scrape, one time series per model."""

    def __init__(self, models: Callable[[], Iterable[ModelSample]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = list(self._models())
        yield _gauge("live", "Accepted answers that have not ended", {m.model: m.live for m in models})
        yield _gauge("model_loaded", "1 while the model is in memory", {m.model: m.stats is not None for m in models})
        for name, text in _MODEL_COUNTERS.items():
            yield _counter(f"model_{name}", text, {m.model: getattr(m, name) for m in models})
        engines = {m.model: m.stats for m in models if m.stats is not None}
        for name, text in _GAUGES.items():
            yield _gauge(name, text, {model: getattr(stats, name) for model, stats in engines.items()})
        for name, text in _COUNTERS.items():
            values = {model: getattr(stats, name) for model, stats in engines.items()}
            yield _counter(name.removesuffix("_total"), text, values)


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"deskside_{name}", text, labels=["model"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


def _counter(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"deskside_{name}", text, labels=["model"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


class Metrics:
    """The server's counters and those of each model. All names begin with `deskside_`."""

    def __init__(self, models: Callable[[], Iterable[ModelSample]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(models))
        self._requests = Counter(
            "deskside_http_requests", "HTTP requests answered", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "deskside_http_request_seconds",
            "From the first byte of the request to the last of the answer",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._texts_cut = Counter(
            "deskside_texts_cut", "Texts of users, cut to the model's length", ["model"], registry=self._registry
        )
        self._first_token = Histogram(
            "deskside_time_to_first_token_seconds",
            "From acceptance to the first token of a call",
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )

    def texts_cut(self, model: str, n: int) -> None:
        """Count texts of an accepted call that were longer than the model reads."""
        self._texts_cut.labels(model).inc(n)

    def request_ended(self, route: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request. `route` must come from a fixed set, since each makes a time series."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the wait of a call for its first token."""
        self._first_token.observe(seconds)

    def render(self) -> bytes:
        """Render the text that Prometheus scrapes."""
        return generate_latest(self._registry)
