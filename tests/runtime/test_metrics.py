"""Metrics: what a scrape says is what the engine holds, and two apps do not mix."""

from prometheus_client.parser import text_string_to_metric_families

from runtime.metrics import Metrics
from runtime.sequence import EngineStats

STATS = EngineStats(3, 2, 100, 512, 1000, 400, 50, 70, 1, decode_seconds_total=9.5, step_seconds_total=10.0)


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, s.labels.get("route", "")): s.value for family in families for s in family.samples}


def test_a_scrape_reads_the_engine_at_that_moment() -> None:
    held = [STATS]
    metrics = Metrics(lambda: held[0], lambda: 5)
    found = samples(metrics)
    assert found["deskside_live", ""] == 5
    assert found["deskside_running", ""] == 3
    assert found["deskside_waiting", ""] == 2
    assert found["deskside_kv_cells_used", ""] == 100
    assert found["deskside_prompt_tokens_total", ""] == 1000
    assert found["deskside_cached_tokens_total", ""] == 400
    assert found["deskside_generated_tokens_total", ""] == 50
    assert found["deskside_steps_total", ""] == 70
    assert found["deskside_preemptions_total", ""] == 1
    assert found["deskside_decode_seconds_total", ""] == 9.5
    assert found["deskside_step_seconds_total", ""] == 10.0
    held[0] = EngineStats(0, 0, 0, 512, 1000, 400, 51, 71, 1)
    assert samples(metrics)["deskside_running", ""] == 0


def test_requests_are_counted_by_route_and_every_name_is_ours() -> None:
    metrics, other = Metrics(lambda: STATS, lambda: 0), Metrics(lambda: STATS, lambda: 0)
    metrics.request_ended("/v1/models", 200, 0.01)
    metrics.request_ended("/v1/models", 200, 0.01)
    metrics.first_token(0.2)
    found = samples(metrics)
    assert found["deskside_http_requests_total", "/v1/models"] == 2
    assert found["deskside_http_request_seconds_count", "/v1/models"] == 2
    assert found["deskside_time_to_first_token_seconds_sum", ""] == 0.2
    assert ("deskside_http_requests_total", "/v1/models") not in samples(other)
    assert all(name.startswith("deskside_") for name, _ in found)
