"""Tool calls over the real vocabulary: whatever the model would say, what is read as a call fits its function."""

import json
from dataclasses import replace

import pytest

from runtime.decoding.grammar import Grammars
from runtime.decoding.schema import closed
from runtime.engine.engine import Engine
from runtime.llama.model import Llama
from runtime.openai.tool_calls import FORMATS, ToolCallReader, tool_grammar
from runtime.requests import Event, Finished, Request, SamplingParams, TextDelta
from runtime.serving.form import control_tokens

pytestmark = pytest.mark.model

FORMS = {form.name: form for form in FORMATS}
# Gemma's vocabulary has no token for calls; one of its control tokens stands in.
FORMS["control"] = replace(FORMS["mistral"], name="control", marker="<start_of_turn>")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
PROMPT = "Ask for the weather in Oslo for two days:\n"


@pytest.fixture(scope="module")
def grammars(loaded_base: Llama) -> Grammars:
    return Grammars(loaded_base.tokenizer)


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral-args", "control"])
def test_a_required_call_can_be_read_and_fits(name: str, base: Llama, grammars: Grammars) -> None:
    form, engine = FORMS[name], Engine(base, grammars=grammars)
    control = control_tokens(form, base.tokenizer)
    assert list(control) == (["<start_of_turn>"] if name == "control" else [])
    grammar = tool_grammar(form, {"get_weather": closed(json.dumps(SCHEMA))}, control, must_call=True, parallel=False)
    prompt = tuple(base.tokenizer.encode(PROMPT, add_special=True, parse_special=False))
    for temperature in (0.0, 1.5):
        params = SamplingParams(60, temperature, seed=3, grammar=grammar, spelled=tuple(control.values()))
        engine.add(Request(f"{temperature}", prompt, params))
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    for temperature in (0.0, 1.5):
        mine = [event for event in events if event.request_id == f"{temperature}"]
        text = "".join(event.text for event in mine if isinstance(event, TextDelta))
        assert text.startswith(form.marker)
        (ended,) = [event for event in mine if isinstance(event, Finished)]
        told = ToolCallReader(form, "r").feed(text)
        assert (ended.reason, told.content, len(told.calls)) == ("stop", "", 1)
        arguments = json.loads(told.calls[0].arguments)
        assert (told.calls[0].name, arguments["days"] in (1, 2, 3)) == ("get_weather", True)
        assert len(arguments["city"]) <= 12
