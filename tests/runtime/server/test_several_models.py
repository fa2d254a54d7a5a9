"""Several toy models behind one server, asked by the official client: who answers, what is said of them, who goes."""

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.manifest import Artefact, Base, Manifest
from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.errors import LoadFailed
from runtime.requests import Request, Scoring
from runtime.server.serve import describe
from runtime.serving.names import ModelRef
from tests.runtime.pool.test_pool import Barrier
from tests.support.runtime.connection import asked
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import PATIENCE_S, Gate, Running, Toys, serving_toys, wait_until

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
LABELS = ("hello", "bye")


def manifest(name: str, sha256: str, **fields: Any) -> Manifest:
    artefact = Artefact(file=f"{name}.gguf", quantization="Q8_0", size_bytes=1, sha256=sha256)
    return Manifest(name=name, licence="MIT", artefacts=(artefact,), **fields)


BASE = manifest("toy", "a" * 64)
MAIL = manifest(
    "mail", "b" * 64, kind="adapter", base=Base(name="toy", sha256="a" * 64), task="classify", labels=LABELS
)


def make_toys(**options: Any) -> Toys:
    make = {
        "toy": lambda: FakeLlama(script="hello", adapters=("mail",)),
        "other": lambda: FakeLlama(script="other"),
    }
    return Toys(make, manifests={"toy": BASE}, **options)


def adapter_of(toys: Toys) -> ModelRef:
    template = "{{ bos_token }}mail:{{ messages[0]['content'] }}<start_of_turn>"
    adapter = StoredModel("mail", Path(), MAIL, Path("mail.gguf"))
    return ModelRef("toy:mail", toys.stored("toy"), adapter, template)


@pytest.fixture(scope="module")
def toys() -> Toys:
    return make_toys()


@pytest.fixture(scope="module")
def running(toys: Toys) -> Iterator[Running]:
    """`toy` with its adapter `toy:mail`, and `other`, in room for one base model."""
    slots = [toys.slot("toy", adapters=[adapter_of(toys)]), toys.slot("other")]
    with serving_toys(toys, slots, budget_bytes=1) as running:
        yield running


def said(running: Running, **fields: Any) -> str:
    answer = running.client().chat.completions.create(**{"model": "toy", "messages": MESSAGES} | fields)
    return str(answer.choices[0].message.content)


def listed(running: Running) -> dict[str, Any]:
    return {model["id"]: model for model in running.http.get("/v1/models").json()["data"]}


def metrics(running: Running) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(running.http.get("/metrics").text)
    return {(s.name, s.labels["model"]): s.value for f in families for s in f.samples if "model" in s.labels}


def test_each_request_is_answered_by_the_model_it_names(running: Running) -> None:
    for _ in range(2):
        assert said(running, model="toy") == "hello"
        assert said(running, model="other") == "other"
    assert running.http.post(CHAT, json={"messages": MESSAGES}).json()["model"] == "toy"
    streamed = running.client().completions.create(model="other", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "other"
    assert said(running, model="toy") == "hello"


def test_an_unknown_model_is_a_404_that_lists_the_served_ones(running: Running) -> None:
    for ask in (
        lambda: said(running, model="gpt-9"),
        lambda: running.client().models.retrieve("gpt-9"),
        lambda: running.client().models.retrieve("mail"),
    ):
        with pytest.raises(openai.NotFoundError, match="'toy', 'toy:mail', 'other'") as caught:
            ask()
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("model", [7, ["toy"], True])
def test_a_model_that_is_no_text_is_a_400(running: Running, model: Any) -> None:
    answer = running.http.post(CHAT, json={"messages": MESSAGES, "model": model})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_an_adapter_has_its_own_template_and_labels_and_reaches_the_engine_by_name(
    running: Running, toys: Toys
) -> None:
    toys.submitted.clear()
    assert said(running, model="toy:mail") == "hello"
    assert said(running, model="toy") == "hello"
    with_adapter, bare = toys.submitted
    assert isinstance(with_adapter, Request)
    assert (with_adapter.adapter, bare.adapter) == ("mail", None)
    assert bytes(token for token in with_adapter.prompt if token < 256) == b"mail:hi"
    choices = [{"value": label} for label in LABELS]
    question = {"type": "choice", "name": "q", "instructions": "which?", "choices": choices}
    body = {"model": "toy:mail", "input": "hi", "questions": [question]}
    answer = running.http.post("/v1/decisions", json=body).raise_for_status().json()
    assert answer["model"] == "toy:mail"
    scored = toys.submitted[-1]
    assert isinstance(scored, Scoring)
    assert scored.adapter == "mail"
    asked = bytes(token for token in scored.questions[0].prompt if token < 256)
    assert asked == b"mail:hi", "its own label question is asked as it was trained"
    vectors = [
        running.client().embeddings.create(model=model, input="hi", encoding_format="float").data[0].embedding
        for model in ("toy", "toy:mail")
    ]
    assert vectors[0] != vectors[1]


def test_an_adapters_answers_have_their_own_fingerprint_and_share_one_engine(running: Running) -> None:
    prints = {
        name: running.http.post(CHAT, json={"messages": MESSAGES, "model": name}).json()["system_fingerprint"]
        for name in ("toy", "toy:mail")
    }
    assert prints == {"toy": f"deskside-{'a' * 12}-fake", "toy:mail": f"deskside-{'a' * 12}-{'b' * 12}-fake"}
    (slot, _), (same, _) = running.pool.find("toy"), running.pool.find("toy:mail")
    assert slot is same


def test_models_are_listed_with_their_state_and_what_is_known_of_them(running: Running) -> None:
    said(running, model="other")
    rows = listed(running)
    assert list(rows) == ["toy", "toy:mail", "other"]
    assert {name: row["state"] for name, row in rows.items()} == {
        "toy": "unloaded",
        "toy:mail": "unloaded",
        "other": "ready",
    }
    assert (rows["toy:mail"]["parent"], rows["toy:mail"]["root"]) == ("toy", "toy")
    assert (rows["toy"]["parent"], rows["toy"]["root"]) == (None, "toy")
    assert (rows["toy:mail"]["meta"]["labels"], rows["toy"]["meta"]["labels"]) == (list(LABELS), [])
    assert (rows["toy"]["meta"]["n_ctx"], rows["toy"]["meta"]["quantization"]) == (512, "Q8_0")
    assert running.client().models.retrieve("toy:mail").model_dump(exclude_unset=True) == rows["toy:mail"]
    assert listed(running)["toy"]["state"] == "unloaded", "asking about a model loads nothing"


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/tokenize", {"content": "a"}, {"tokens": [97]}),
        ("/detokenize", {"tokens": [97]}, {"content": "a"}),
        ("/apply-template", {"messages": MESSAGES}, {"prompt": "<bos>mail:hi<start_of_turn>"}),
    ],
)
def test_the_small_routes_choose_by_model_too(
    running: Running, path: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert running.http.post(path, json=body | {"model": "toy:mail"}).json() == expected
    assert running.http.post(path, json=body | {"model": "other"}).status_code == 200
    assert running.http.post(path, json=body | {"model": "gpt-9"}).status_code == 404


def test_health_and_metrics_tell_the_models_apart(running: Running) -> None:
    before = metrics(running)["deskside_model_loads_total", "other"]
    said(running, model="toy")
    said(running, model="other")
    wait_until(lambda: not running.http.get("/health").json()["running"])
    answer = running.http.get("/health").json()
    assert (answer["status"], answer["model"], answer["running"], answer["accepted"]) == ("ok", "toy", 0, 0)
    engine = {"running": 0, "accepted": 0, "restarts": 0, "last_cause": None, "silent_s": 0}
    assert answer["models"] == {"toy": {"state": "unloaded"} | engine, "other": {"state": "ready"} | engine}
    found = metrics(running)
    assert (found["deskside_model_loaded", "toy"], found["deskside_model_loaded", "other"]) == (0, 1)
    assert found["deskside_model_loads_total", "other"] == before + 1
    assert found["deskside_generated_tokens_total", "other"] >= 5
    assert ("deskside_generated_tokens_total", "toy") not in found


def background(pool: ThreadPoolExecutor, running: Running, **fields: Any) -> Future[httpx.Response]:
    body = {"messages": MESSAGES, "max_tokens": 5} | fields
    return pool.submit(lambda: httpx.post(running.url + CHAT, json=body, timeout=60))


def test_a_model_is_held_until_its_stream_has_ended() -> None:
    gate = Gate()
    slow = {"toy": lambda: FakeLlama(script="hello", on_decode=gate), "other": lambda: FakeLlama(script="other")}
    toys = Toys(slow)
    slots = [toys.slot("toy"), toys.slot("other")]
    with serving_toys(toys, slots, budget_bytes=1, room_wait_s=0) as running, ThreadPoolExecutor(1) as pool:
        streaming = background(pool, running, stream=True)
        gate.wait()
        refused = running.http.post(CHAT, json={"messages": MESSAGES, "model": "other"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_has_no_room")
        assert int(refused.headers["retry-after"]) >= 1
        assert "'toy'" in refused.json()["error"]["message"]
        gate.open()
        assert streaming.result().text.endswith("data: [DONE]\n\n")
        wait_until(lambda: slots[0].leases == 0)
        assert said(running, model="other") == "other"
        assert slots[0].state == "unloaded"


def test_a_client_that_leaves_gives_its_model_back() -> None:
    gate = Gate()
    toys = Toys({"toy": lambda: FakeLlama(script="hello" * 50, n_ctx=2048, on_decode=gate)})
    slots = [toys.slot("toy")]
    with serving_toys(toys, slots) as running:
        with asked(running.url, CHAT, {"messages": MESSAGES, "stream": True}):
            gate.wait()
            assert slots[0].leases == 1
        gate.open()
        wait_until(lambda: slots[0].leases == 0)


def test_a_load_that_fails_is_a_503_and_the_others_go_on() -> None:
    def on_load(name: str) -> None:
        if name == "other":
            raise LoadFailed("'other.gguf' is damaged")

    toys = make_toys(on_load=on_load)
    with serving_toys(toys, [toys.slot("toy"), toys.slot("other")], budget_bytes=1) as running:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="is damaged") as caught:
                said(running, model="other")
            assert (caught.value.status_code, caught.value.code) == (503, "model_not_loaded")
        assert said(running, model="toy") == "hello"
        assert listed(running)["other"]["state"] == "failed"
        assert running.http.get("/health").json()["models"]["other"]["state"] == "failed"
        assert metrics(running)["deskside_model_load_failures_total", "other"] == 1


def test_while_one_model_is_loaded_another_answers() -> None:
    barrier = Barrier()
    toys = make_toys(on_load=lambda name: barrier() if name == "other" else None)
    slots = [toys.slot("toy"), toys.slot("other", needs=4)]
    with serving_toys(toys, slots, budget_bytes=4) as running, ThreadPoolExecutor(1) as pool:
        slots[1].need = slots[0].need  # it fits beside the first, but was not loaded at the start
        waiting = background(pool, running, model="other")
        assert barrier.reached.wait(PATIENCE_S)
        assert said(running, model="toy") == "hello"
        assert listed(running)["other"]["state"] == "loading"
        barrier.open()
        assert waiting.result().json()["choices"][0]["message"]["content"] == "other"


def test_a_signal_during_a_load_tells_those_who_wait_and_stops_cleanly() -> None:
    barrier = Barrier()
    toys = make_toys(on_load=lambda name: barrier() if name == "other" else None)
    slots = [toys.slot("toy"), toys.slot("other")]
    with serving_toys(toys, slots, budget_bytes=1) as running, ThreadPoolExecutor(2) as pool:
        waiting = [background(pool, running, model="other", stream=stream) for stream in (False, True)]
        assert barrier.reached.wait(PATIENCE_S)
        wait_until(lambda: slots[1].waiting == 2)
        running.server.handle_exit(signal.SIGTERM, None)
        for answer in waiting:
            assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (503, "shutting_down")
        barrier.open()
    assert [(name, llama.closed) for name, llama in toys.made] == [("toy", True), ("other", True)]


def test_an_idle_model_is_unloaded_by_itself_and_comes_back() -> None:
    toys = make_toys()
    slots = [toys.slot("toy")]
    with serving_toys(toys, slots, idle_s=0.01) as running:
        wait_until(lambda: slots[0].unloads > 0)
        assert said(running, model="toy") == "hello"


def test_the_start_up_lines_name_every_model() -> None:
    toys = make_toys()
    slots = [toys.slot("toy"), toys.slot("other", needs=7 << 20)]
    with serving_toys(toys, slots, budget_bytes=7 << 20) as running:
        lines = describe(running.pool, RuntimeConfig(), "http://here").splitlines()
        fast = describe(running.pool, RuntimeConfig(fast=True), "http://here")
    assert lines[0].startswith("toy (Q8_0, 0 MiB) on fake, 1 threads, 16 slots, context 512, loaded in ")
    assert ", 1 threads, 16 slots (fast), context 512, " in fast
    assert lines[1:] == ["other is loaded on its first request (needs about 7 MiB): http://here/v1"]
