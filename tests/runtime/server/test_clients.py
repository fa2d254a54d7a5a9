"""Client libraries at work: an agent of pydantic-ai, and the bodies that instructor and litellm send."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from tests.support.runtime import tool_templates as templates
from tests.support.runtime.fakes import EOS, FakeLlama
from tests.support.runtime.serving import Running, serving

CHAT = "/v1/chat/completions"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SAID = '{"label": "ham", "urgent": true}'
RESULT = "8 degrees"


class Mail(BaseModel):
    """What a mail is."""

    label: str = Field(max_length=20)
    urgent: bool


def call_then_say(history: tuple[int, ...]) -> int:
    """A model that calls `weather`, and answers in JSON once the call has its result."""
    said = bytes(token for token in history if token < 256)
    answer = SAID if RESULT.encode() in said else CALL
    written = next(n for n in range(len(answer), -1, -1) if said.endswith(answer[:n].encode()))
    return answer.encode()[written] if written < len(answer) else EOS


@pytest.fixture(scope="module")
def caller() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=4096, script=call_then_say, template=templates.HERMES)) as running:
        yield running


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """A server whose model says anything."""
    with serving(FakeLlama(n_ctx=4096, template=templates.HERMES)) as running:
        yield running


Kind = type[OpenAIChatModel] | type[OpenAIResponsesModel]


def ask(toy: Running, kind: Kind, settings: ModelSettings, stream: bool = False, **agent: Any) -> Any:
    """The output of an agent that is asked once."""

    async def output() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{toy.url}/v1", api_key="none", max_retries=0) as client:
            provider = OpenAIProvider(openai_client=client)
            asked: Any = Agent(kind("toy", provider=provider), model_settings=settings, **agent)
            if not stream:
                return (await asked.run("which?")).output
            async with asked.run_stream("which?") as run:
                return await run.get_output()

    return asyncio.run(output())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_an_agent_sends_its_tools_and_its_form_on_each_turn(caller: Running, kind: Kind, stream: bool) -> None:
    told: list[str] = []

    def weather(city: str) -> str:
        """Tell the weather of a city."""
        told.append(city)
        return RESULT

    form = NativeOutput(Mail)
    output = ask(caller, kind, {"temperature": 0}, stream, output_type=form, tools=[weather])
    assert (output, told) == (Mail(label="ham", urgent=True), ["Oslo"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_an_agent_gets_its_output_from_a_call(noisy: Running, kind: Kind, stream: bool) -> None:
    settings: ModelSettings = {"temperature": 0, "parallel_tool_calls": False}
    assert isinstance(ask(noisy, kind, settings, stream, output_type=ToolOutput(Mail)), Mail)


USER = {"role": "user", "content": "hi"}
SCHEMA = {
    "properties": {
        "label": {"maxLength": 20, "title": "Label", "type": "string"},
        "urgent": {"title": "Urgent", "type": "boolean"},
    },
    "required": ["label", "urgent"],
    "type": "object",
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
LITELLM_FORM = {
    "type": "json_schema",
    "json_schema": {
        "schema": SCHEMA | {"title": "Mail", "additionalProperties": False},
        "name": "Mail",
        "strict": True,
    },
}


def instructor_call(name: str) -> dict[str, Any]:
    """The body of instructor 1.17.0 in its mode TOOLS."""
    said = f"Correctly extracted `{name}` with all the required parameters with correct types"
    function = {"name": name, "description": said, "parameters": SCHEMA}
    named = {"type": "function", "function": {"name": name}}
    return {"messages": [USER], "tool_choice": named, "tools": [{"type": "function", "function": function}]}


INSTRUCTOR_FORM = {"type": "json_schema", "json_schema": {"name": "Mail", "schema": SCHEMA | {"title": "Mail"}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", [INSTRUCTOR_FORM, LITELLM_FORM], ids=["instructor 1.17.0", "litellm 1.110.2"])
def test_a_form_as_libraries_send_it_holds(noisy: Running, form: dict[str, Any], stream: bool) -> None:
    for seed in range(3):
        text, calls = answer_of(noisy, {"messages": [USER], "response_format": form, "seed": seed}, stream)
        assert calls == {}
        Mail.model_validate_json(text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["Mail", "PartialMail"])
def test_instructors_call_fits_its_schema(noisy: Running, name: str, stream: bool) -> None:
    text, calls = answer_of(noisy, instructor_call(name), stream)
    assert (text, list(calls)) == ("", [name])
    Mail.model_validate_json(calls[name])


@pytest.mark.parametrize("stream", [False, True])
def test_litellms_tools_beside_a_form_give_calls_or_a_text_that_fits(caller: Running, stream: bool) -> None:
    tools = [WEATHER | {"function": {**WEATHER["function"], "name": "weather"}}]
    body = {
        "messages": [USER],
        "response_format": LITELLM_FORM,
        "tools": tools,
        "tool_choice": "auto",
        "temperature": 0,
    }
    assert answer_of(caller, body, stream) == ("", {"weather": '{"city": "Oslo"}'})
    # litellm sends an assistant's message without its content, and names the function in the result.
    call = {"function": {"arguments": '{"city": "Oslo"}', "name": "weather"}, "id": "1", "type": "function"}
    turns = [USER, {"role": "assistant", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "1", "content": RESULT, "name": "weather"})
    assert answer_of(caller, body | {"messages": turns}, stream) == (SAID, {})


def answer_of(toy: Running, body: dict[str, Any], stream: bool) -> tuple[str, dict[str, str]]:
    """The text of an answer, and its calls' arguments by their names."""
    body = {"model": "toy", "max_tokens": 400} | body
    if not stream:
        message = toy.http.post(CHAT, json=body).raise_for_status().json()["choices"][0]["message"]
        functions = [call["function"] for call in message.get("tool_calls", [])]
        return message["content"] or "", {call["name"]: call["arguments"] for call in functions}
    answered = toy.http.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    lines = answered.raise_for_status().text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    text, names, arguments = "", [], []
    for delta in deltas:
        text += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "name" in call["function"]:
                names.append(call["function"]["name"])
                arguments.append("")
            arguments[call["index"]] += call["function"].get("arguments") or ""
    return text, dict(zip(names, arguments, strict=True))
