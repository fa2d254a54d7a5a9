"""Prometheus metrics of one app, in a registry of its own, so that two apps in one process do not mix."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .sequence import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_GAUGES = {
    "running": "Answers being written",
    "waiting": "Answers waiting for a slot in the engine",
    "kv_cells_used": "KV cache cells in use",
    "kv_cells_total": "KV cache cells there are",
}
_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens of all answers",
    "cached_tokens_total": "Prompt tokens that were found in the KV cache",
    "generated_tokens_total": "Tokens generated",
    "steps_total": "Engine steps",
    "preemptions_total": "Sequences set back because the KV cache was full",
    "engine_restarts_total": "Times the engine's process was started again",
}


class _EngineCollector(Collector):
    """Reads the engine's own counts at the moment of a scrape."""

    def __init__(self, stats: Callable[[], EngineStats], live: Callable[[], int]) -> None:
        self._stats = stats
        self._live = live

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("deskside_live", "Accepted answers that have not ended", value=self._live())
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"deskside_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"deskside_{name.removesuffix('_total')}", text, value=getattr(stats, name))


class Metrics:
    """What the server counts, and the engine's counts beside it. All names begin with `deskside_`."""

    def __init__(self, stats: Callable[[], EngineStats], live: Callable[[], int]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(stats, live))
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
        self._first_token = Histogram(
            "deskside_time_to_first_token_seconds",
            "From acceptance to the first token of a call",
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )

    def request_ended(self, route: str, status: int, seconds: float) -> None:
        """Count an answered HTTP request. `route` must come from a fixed set, since each makes a time series."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Note how long a call waited for its first token."""
        self._first_token.observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
