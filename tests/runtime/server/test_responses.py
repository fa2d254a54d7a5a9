"""`/v1/responses` over HTTP, by the official client: whole, streamed and parsed; calls, limits, faults and refusals."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from runtime.errors import Cancelled, DecodeFailed
from runtime.requests import Failed
from tests.support.runtime import tool_templates as templates
from tests.support.runtime.connection import answered, asked
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.observed import Observed
from tests.support.runtime.serving import Gate, Running, serving, wait_until

PATH = "/v1/responses"
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "f",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]},
        "strict": True,
    },
    {"type": "function", "name": "g", "parameters": None, "strict": None},
]
CREATED, STARTED = "response.created", "response.in_progress"
ADDED, DONE = "response.output_item.added", "response.output_item.done"
PART, PART_DONE = "response.content_part.added", "response.content_part.done"
TEXT, TEXT_DONE = "response.output_text.delta", "response.output_text.done"
ARGUMENTS, ARGUMENTS_DONE = "response.function_call_arguments.delta", "response.function_call_arguments.done"
COMPLETED = "response.completed"


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=2048, script="hello")) as running:
        yield running


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """A server whose model says anything."""
    with serving(FakeLlama(n_ctx=2048)) as running:
        yield running


def folded(kinds: list[str]) -> list[str]:
    """Kinds of events in order, runs of one kind as one."""
    return [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]


def events_of(running: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The raw events; each carries its name, its number, and what the client's types want."""
    response = running.http.post(PATH, json=body | {"stream": True}).raise_for_status()
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    return events


def test_a_response_is_made(toy: Running) -> None:
    made = toy.client().responses.create(
        model="toy", input="hi", instructions="be brief", metadata={"a": "b"}, temperature=0.5, top_p=0.5, store=False
    )
    assert made.output_text == "hello"
    assert (made.status, made.object, made.error, made.incomplete_details) == ("completed", "response", None, None)
    assert (made.model, made.instructions, made.metadata) == ("toy", "be brief", {"a": "b"})
    assert (made.temperature, made.top_p, made.tools) == (0.5, 0.5, [])
    assert made.id.startswith("resp_")
    assert made.completed_at is not None
    (item,) = made.output
    assert isinstance(item, ResponseOutputMessage)
    assert item.id.startswith("msg_")
    assert item.status == "completed"
    assert made.usage is not None
    assert made.usage.output_tokens == 6  # five letters and the end
    assert made.usage.total_tokens == made.usage.input_tokens + 6
    assert made.usage.output_tokens_details.reasoning_tokens == 0


def test_it_is_asked_as_a_chat_would_be(toy: Running) -> None:
    started = len(toy.llama.batches)
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "one"}]}]
    usage = toy.client().responses.create(model="toy", instructions="two", input=items, max_output_tokens=1).usage
    tokens = [int(token) for batch in toy.llama.batches[started:] for token in batch.tokens]
    asked = toy.served.prompter.chat([{"role": "system", "content": "two"}, {"role": "user", "content": "one"}])
    assert usage is not None
    assert usage.input_tokens == len(asked)
    cached = usage.input_tokens_details.cached_tokens
    assert tuple(tokens[: len(asked) - cached]) == asked[cached:]


def test_the_events_of_a_text(toy: Running) -> None:
    events = events_of(toy, {"input": "hi"})
    kinds = [event["type"] for event in events]
    assert folded(kinds) == [CREATED, STARTED, ADDED, PART, TEXT, TEXT_DONE, PART_DONE, DONE, COMPLETED]
    assert "".join(event["delta"] for event in events if event["type"] == TEXT) == "hello"
    ids = {event["item_id"] for event in events if "item_id" in event} | {
        event["item"]["id"] for event in events if "item" in event
    }
    assert len(ids) == 1
    whole = toy.http.post(PATH, json={"input": "hi"}).json()
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    Response.model_validate(response)
    output = [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in response["output"]]
    unlike = {"id", "created_at", "completed_at", "usage"}
    return {k: v for k, v in response.items() if k not in unlike} | {"output": output}


def test_the_client_streams_and_accumulates(toy: Running) -> None:
    client = toy.client()
    text = "".join(
        event.delta
        for event in client.responses.create(model="toy", input="hi", stream=True)
        if event.type == "response.output_text.delta"
    )
    assert text == "hello"
    with client.responses.stream(model="toy", input="hi") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "hello"


class Mail(BaseModel):
    label: Literal["spam", "ham"]
    urgent: bool


def test_the_clients_parse_gets_its_type(noisy: Running) -> None:
    client = noisy.client()
    for seed in range(4):
        parsed = client.responses.parse(model="toy", input="x", text_format=Mail, extra_body={"seed": seed})
        assert isinstance(parsed.output_parsed, Mail)
    with client.responses.stream(model="toy", input="x", text_format=Mail) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        final = stream.get_final_response()
    assert isinstance(done[0].parsed, Mail)
    assert isinstance(final.output_parsed, Mail)


def test_a_json_object_is_one(noisy: Running) -> None:
    made = noisy.client().responses.create(model="toy", input="x", text={"format": {"type": "json_object"}})
    if made.status == "completed":
        assert isinstance(json.loads(made.output_text), dict)
    assert made.output_text.startswith("{")


def test_a_limit_leaves_it_incomplete(toy: Running) -> None:
    made = toy.client().responses.create(model="toy", input="hi", max_output_tokens=3)
    assert (made.output_text, made.status) == ("hel", "incomplete")
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output[0].status == "incomplete"  # type: ignore[union-attr]
    events = events_of(toy, {"input": "hi", "max_output_tokens": 3})
    assert events[-1]["type"] == "response.incomplete"
    assert without_ids(events[-1]["response"])["output"][0]["content"][0]["text"] == "hel"


def test_log_probabilities_where_asked_for(toy: Running) -> None:
    body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = toy.http.post(PATH, json=body).json()["output"][0]["content"][0]
    assert [token["token"] for token in part["logprobs"]] == list("hello")
    assert all(len(token["top_logprobs"]) == 2 for token in part["logprobs"])
    events = events_of(toy, body)
    streamed = [token for event in events if event["type"] == TEXT for token in event["logprobs"]]
    assert streamed == part["logprobs"]
    assert toy.http.post(PATH, json={"input": "hi"}).json()["output"][0]["content"][0]["logprobs"] == []


def test_calls_are_items_whole_and_streamed() -> None:
    said = "Wait." + templates.TWO_CALLS[templates.HERMES]
    with serving(FakeLlama(n_ctx=4096, script=said, template=templates.HERMES)) as toy:
        body = {"input": "hi", "tools": TOOLS, "temperature": 0}
        made = toy.client().responses.create(model="toy", input="hi", tools=TOOLS, temperature=0)
        message, *calls = made.output
        assert isinstance(message, ResponseOutputMessage)
        assert made.output_text == "Wait."
        read = [(call.name, call.arguments) for call in calls if isinstance(call, ResponseFunctionToolCall)]
        assert read == [("f", '{"city": "Oslo"}'), ("g", "{}")]
        events = events_of(toy, body)
        kinds = folded([event["type"] for event in events])
        text, call = [ADDED, PART, TEXT, TEXT_DONE, PART_DONE, DONE], [ADDED, ARGUMENTS, ARGUMENTS_DONE, DONE]
        assert kinds == [CREATED, STARTED, *text, *call, *call, COMPLETED]
        assert without_ids(events[-1]["response"]) == without_ids(made.model_dump(exclude_unset=True))
        indices = [event["output_index"] for event in events if event["type"] == ADDED]
        assert indices == [0, 1, 2]
        with toy.client().responses.stream(model="toy", input="hi", tools=TOOLS, temperature=0) as stream:
            final = stream.get_final_response()
        assert [item.type for item in final.output] == ["message", "function_call", "function_call"]


def test_the_result_of_a_call_is_handed_back() -> None:
    script = templates.TWO_CALLS[templates.LLAMA]
    with serving(FakeLlama(n_ctx=4096, script=script, template=templates.LLAMA)) as toy:
        client = toy.client()
        made = client.responses.create(model="toy", input="hi", tools=TOOLS, tool_choice="required", temperature=0)
        (call,) = made.output
        assert isinstance(call, ResponseFunctionToolCall)
        started = len(toy.llama.batches)
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "8 C"}
        turns: Any = [{"role": "user", "content": "hi"}, *made.output, result]
        client.responses.create(model="toy", input=turns, tools=TOOLS, tool_choice="none", max_output_tokens=1)
        tokens = [int(token) for batch in toy.llama.batches[started:] for token in batch.tokens]
        prompt = b"".join(map(toy.llama.tokenizer.token_bytes, tokens)).decode()
    assert "assistant\n" + script in prompt
    assert f"8 C ANSWERS {call.call_id}" in prompt


def test_a_fault_while_streaming_is_the_last_event() -> None:
    gate = Gate()
    with serving(FakeLlama(script="hello", fail_at={3: DecodeFailed("broken")}, on_decode=gate)) as toy:
        gate.open()
        events = events_of(toy, {"input": "hi"})
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["status"] == "failed"
        assert "broken" in events[-1]["response"]["error"]["message"]
        assert events[-1]["response"]["error"]["code"] == "server_error"


def test_a_fault_before_the_end_of_a_whole_response_is_an_error() -> None:
    with serving(FakeLlama(script="hello", fail_at={3: DecodeFailed("broken")})) as toy:
        response = toy.http.post(PATH, json={"input": "hi"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "decode_failed")


def test_a_response_that_is_cancelled_just_ends(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    with serving(FakeLlama(script="hello", on_decode=gate)) as toy:
        observed = Observed(toy.supervisor)
        with asked(toy.url, PATH, {"input": "hi", "stream": True}) as connection:
            gate.wait()
            toy.supervisor.cancel(tuple(observed.events))
            gate.open()
            status, _, content = answered(connection)
        [events] = observed.events.values()
        assert isinstance(events[-1], Failed)
        assert isinstance(events[-1].error, Cancelled)
    kinds = [line.removeprefix("event: ") for line in content.decode().splitlines() if line.startswith("event: ")]
    assert (status, kinds[0]) == (200, CREATED)
    assert not {COMPLETED, "response.failed", "response.incomplete"} & set(kinds)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    gate = Gate()
    with serving(FakeLlama(script="hello " * 200, n_ctx=2048, on_decode=gate)) as toy:
        observed = Observed(toy.supervisor)
        with asked(toy.url, PATH, {"input": "hi", "stream": stream}):
            gate.wait()
        wait_until(lambda: observed.cancelled)
        gate.open()
        wait_until(lambda: toy.supervisor.live == 0)
        assert toy.llama.decodes < 3, "the response was written on for nobody"
        wait_until(lambda: toy.supervisor.stats().running == 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto", "input": "x" * 10_000}, "input"),
        ({"model": "gpt-5"}, "model"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"input": "x" * 10_000}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}}}, "text.format"),
        ({"tools": TOOLS}, "tools"),
        ({"input": [{"type": "function_call_output", "call_id": "9", "output": ""}]}, "input[0].call_id"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ],
)
def test_a_refusal_comes_before_the_engine_and_names_the_field(
    toy: Running, fields: dict[str, Any], param: str
) -> None:
    decodes = toy.llama.decodes
    for stream in (False, True):
        response = toy.http.post(PATH, json={"input": "hi", "stream": stream} | fields)
        error = response.json()["error"]
        assert response.status_code == (404 if param == "model" else 400)
        assert error["param"] == param
        assert not any(word in error["message"] for word in ("max_completion", "response_format", "messages"))
    assert toy.llama.decodes == decodes


def test_the_client_raises_its_own_errors(toy: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        toy.client().responses.create(model="toy", input="hi", previous_response_id="x")
    with pytest.raises(openai.NotFoundError):
        toy.client().responses.create(model="other", input="hi")
