"""Metrics: what a scrape says is what the engine holds, and two apps do not mix."""

from prometheus_client.parser import text_string_to_metric_families

from runtime.monitoring.metrics import Metrics, ModelSample
from runtime.requests import EngineStats

STATS = EngineStats(3, 2, 100, 512, 1000, 400, 50, 70, 1, 9.5, 10.0, 40, 30)


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, s.labels.get("route", "")): s.value for family in families for s in family.samples}


def test_a_scrape_reads_the_engine_at_that_moment() -> None:
    held = [STATS]
    metrics = Metrics(lambda: [ModelSample("toy", 5, held[0])])
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
    assert found["deskside_draft_tokens_total", ""] == 40
    assert found["deskside_draft_tokens_accepted_total", ""] == 30
    assert found["deskside_decode_seconds_total", ""] == 9.5
    assert found["deskside_step_seconds_total", ""] == 10.0
    held[0] = EngineStats(0, 0, 0, 512, 1000, 400, 51, 71, 1)
    assert samples(metrics)["deskside_running", ""] == 0


def test_requests_are_counted_by_route_and_every_name_is_ours() -> None:
    metrics, other = (Metrics(lambda: [ModelSample("toy", 0, STATS)]) for _ in range(2))
    metrics.request_ended("/v1/models", 200, 0.01)
    metrics.request_ended("/v1/models", 200, 0.01)
    metrics.first_token(0.2)
    found = samples(metrics)
    assert found["deskside_http_requests_total", "/v1/models"] == 2
    assert found["deskside_http_request_seconds_count", "/v1/models"] == 2
    assert found["deskside_time_to_first_token_seconds_sum", ""] == 0.2
    assert ("deskside_http_requests_total", "/v1/models") not in samples(other)
    assert all(name.startswith("deskside_") for name, _ in found)


def test_each_model_has_a_series_of_its_own_and_one_that_is_not_loaded_only_its_loads() -> None:
    models = [ModelSample("a", 5, STATS, loads=2, unloads=1), ModelSample("b", 0, None, loads=0, load_failures=3)]
    families = text_string_to_metric_families(Metrics(lambda: models).render().decode())
    found = {(s.name, s.labels["model"]): s.value for family in families for s in family.samples if "model" in s.labels}
    assert (found["deskside_live", "a"], found["deskside_live", "b"]) == (5, 0)
    assert (found["deskside_model_loaded", "a"], found["deskside_model_loaded", "b"]) == (1, 0)
    assert (found["deskside_model_loads_total", "a"], found["deskside_model_unloads_total", "a"]) == (2, 1)
    assert found["deskside_model_load_failures_total", "b"] == 3
    assert found["deskside_running", "a"] == 3
    assert ("deskside_running", "b") not in found
