"""What clients, health checks and metrics see of an engine that dies and comes back."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.config import RuntimeConfig
from runtime.worker.process import EngineProcess
from tests.support.runtime.serving import PATIENCE_S, Running, serving, wait_until
from tests.support.runtime.toy_engine import POISON, FakeRecipe

CHAT = "/v1/chat/completions"


@contextmanager
def served(recipe: FakeRecipe, config: RuntimeConfig | None = None) -> Iterator[Running]:
    with serving(config=config or RuntimeConfig(slots=4, queue=8), process=EngineProcess(recipe, "toy")) as running:
        yield running


def body(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40} | fields


def test_a_stream_that_has_begun_ends_in_an_error_event_and_the_next_one_is_answered(tmp_path: Path) -> None:
    with served(FakeRecipe(tmp_path, script="heKllo")) as running:
        response = running.http.post(CHAT, json=body(stream=True))
        events = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]
        assert [event["error"]["code"] for event in events if "error" in event] == ["engine_died"]
        assert "SIGKILL" in events[-1]["error"]["message"]
        (tmp_path / "done-K").unlink()
        chunks = running.client().chat.completions.create(model="toy", messages=body()["messages"], stream=True)
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(chunks)
        answer = running.http.post(CHAT, json=body()).json()
        assert answer["choices"][0]["message"]["content"] == "heKllo"


def test_a_client_that_waits_for_the_whole_answer_notices_nothing(tmp_path: Path) -> None:
    with served(FakeRecipe(tmp_path, script="heKllo")) as running:
        answer = running.http.post(CHAT, json=body(n=3)).json()
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["heKllo"] * 3
        assert running.supervisor.restarts == 1


def test_poison_is_a_500_and_no_more_than_that(tmp_path: Path) -> None:
    with served(FakeRecipe(tmp_path)) as running:
        response = running.http.post(CHAT, json=body(POISON))
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_died")
        assert running.http.post(CHAT, json=body()).status_code == 200


def test_health_and_metrics_tell_of_a_restart_and_newcomers_wait_for_it(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)
    with served(recipe) as running, ThreadPoolExecutor(2) as pool:

        def ask(text: str) -> httpx.Response:
            return httpx.post(running.url + CHAT, json=body(text), timeout=PATIENCE_S)

        before = running.http.get("/health").json()
        assert (before["status"], before["restarts"], before["last_cause"]) == ("ok", 0, None)
        first = pool.submit(ask, "W")
        wait_until((tmp_path / "waits").exists)
        (tmp_path / "hold").touch()
        os.kill(recipe.pids[0], signal.SIGKILL)
        wait_until(lambda: running.supervisor.state == "restarting")
        second = pool.submit(ask, "b")
        wait_until(lambda: running.supervisor.live == 2)
        during = running.http.get("/health")
        assert (during.status_code, during.json()["status"]) == (503, "restarting")
        assert "SIGKILL" in during.json()["last_cause"]
        assert running.http.get("/health/live").status_code == 200
        (tmp_path / "go").touch()
        (tmp_path / "hold").unlink()
        assert [answer.result().status_code for answer in (first, second)] == [200, 200]
        after = running.http.get("/health")
        assert (after.status_code, after.json()["restarts"]) == (200, 1)
        assert 'deskside_engine_restarts_total{model="toy"} 1.0' in running.http.get("/metrics").text


def test_a_server_whose_engine_is_given_up_stops(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)
    with served(recipe) as running:
        (tmp_path / "refuse").touch()
        response = running.http.post(CHAT, json=body("K"))
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_loaded")
        wait_until(lambda: running.server.should_exit)
        assert running.supervisor.state == "failed"
