"""Grammars over the real vocabulary: answers fit, forced tokens save steps, and they spell what llama.cpp would."""

import json

import pytest

from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.llama.model import Llama
from runtime.requests import Event, Finished, Grammar, Request, SamplingParams, TextDelta

pytestmark = pytest.mark.model

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["spam", "exmh-users", "exmh-workers"]},
        "urgent": {"type": "boolean"},
        "subject": {"type": "string", "maxLength": 20},
    },
    "required": ["label", "urgent", "subject"],
    "additionalProperties": False,
}
LABEL = Grammar("json_schema", json.dumps(SCHEMA), "response_format")
LISTS = Grammar("choice", '["exmh-users", "exmh-workers"]', "choice")
MAIL = "Subject: meeting moved\n\nHi all, the meeting moved to Thursday at ten.\n\nAs JSON:"


@pytest.fixture(scope="module")
def grammars(loaded_base: Llama) -> Grammars:
    return Grammars(loaded_base.tokenizer)


def ask(llama: Llama, name: str, params: SamplingParams) -> Request:
    return Request(name, tuple(llama.tokenizer.encode(MAIL, add_special=True, parse_special=False)), params)


def run(engine: Engine, *requests: Request) -> dict[str, tuple[str, list[int], Finished]]:
    """Each answer's text, tokens and end."""
    for request in requests:
        engine.add(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    ends = {event.request_id: event for event in events if isinstance(event, Finished)}
    deltas = [event for event in events if isinstance(event, TextDelta)]
    texts = {name: "".join(delta.text for delta in deltas if delta.request_id == name) for name in ends}
    tokens = {name: [t for delta in deltas if delta.request_id == name for t in delta.token_ids] for name in ends}
    return {name: (texts[name], tokens[name], end) for name, end in ends.items()}


def test_answers_under_a_schema_parse_beside_neighbours_without(base: Llama, grammars: Grammars) -> None:
    engine = Engine(base, grammars=grammars)
    requests = [ask(base, str(i), SamplingParams(60, i / 2, seed=i, grammar=LABEL)) for i in range(3)]
    answers = run(engine, *requests, ask(base, "plain", SamplingParams(5, 0, ignore_eos=True)))
    assert len(answers) == 4
    assert answers.pop("plain")[2].usage.completion_tokens == 5
    for text, _, end in answers.values():
        answer = json.loads(text)
        assert end.reason == "stop"
        assert answer["label"] in ("spam", "exmh-users", "exmh-workers")
        assert (type(answer["urgent"]), len(answer["subject"]) <= 20) == (bool, True)


def test_forced_tokens_save_steps_and_are_the_tokens_of_the_text(base: Llama, grammars: Grammars) -> None:
    engine = Engine(base, grammars=grammars)
    text, tokens, end = run(engine, ask(base, "a", SamplingParams(60, 0, grammar=LISTS)))["a"]
    assert text in ("exmh-users", "exmh-workers")
    assert base.tokenizer.decode(tokens) == text
    assert end.usage.completion_tokens == len(tokens) > engine.stats().steps_total


def test_control_tokens_are_never_allowed_and_text_that_looks_like_one_is(base: Llama, grammars: Grammars) -> None:
    state = grammars.compile(LABEL)
    assert base.tokenizer.decode(state.forced()) == '{"label": "'
    state.accept(
        base.tokenizer.encode('{"label": "spam", "urgent": true, "subject": "', add_special=False, parse_special=False)
    )
    (turn,) = base.tokenizer.encode("<start_of_turn>", add_special=False, parse_special=True)
    allowed = state.allowed()
    assert not allowed[turn]
    assert allowed.sum() > base.info.n_vocab // 2
    state.accept(base.tokenizer.encode("<start_of_turn>", add_special=False, parse_special=False))
