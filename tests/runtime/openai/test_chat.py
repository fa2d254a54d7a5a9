"""The wire, without a server: each row of the field table, each bound, and answers as folds over events."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from runtime.errors import DecodeFailed, InvalidRequest
from runtime.openai.answer import DONE, TextAnswer, TextCall, TextOffsets
from runtime.openai.chat import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_ANSWERS_PER_CALL,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    ChatBody,
    CompletionBody,
    TokenizedPrompt,
    parse,
    to_requests,
    token_limit,
)
from runtime.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, FieldRule, Table, below
from runtime.openai.wire import Endpoint
from runtime.requests import Event, Failed, Finished, Request, SamplingParams, TextDelta, TokenLogprob, Usage

MESSAGES = [{"role": "user", "content": "hi"}]
MINIMAL: dict[Endpoint, dict[str, Any]] = {"chat": {"messages": MESSAGES}, "completion": {"prompt": "hi"}}
TABLES: dict[Endpoint, Table] = {"chat": below(CHAT_FIELDS), "completion": below(COMPLETION_FIELDS)}
ROWS = [(rule, kind) for kind, table in TABLES.items() for rule in table.values()]
# A value of each used field, and what the engine's request then holds.
USED: dict[str, tuple[Any, str, Any]] = {
    "max_tokens": (7, "max_tokens", 7),
    "max_completion_tokens": (7, "max_tokens", 7),
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.25, "top_p", 0.25),
    "top_k": (40, "top_k", 40),
    "min_p": (0.1, "min_p", 0.1),
    "seed": (-2, "seed", (1 << 64) - 2),
    "stop": ("END", "stop", ("END",)),
    "presence_penalty": (-2, "presence_penalty", -2.0),
    "frequency_penalty": (2, "frequency_penalty", 2.0),
    "logit_bias": ({"65": 3}, "logit_bias", {65: 3.0}),
    "ignore_eos": (True, "ignore_eos", True),
}


def requests_of(kind: Endpoint, **fields: Any) -> tuple[Request, ...]:
    body = parse(kind, MINIMAL[kind] | fields)
    limit = token_limit(body)[0] or 99
    prompts = [TokenizedPrompt((1, 2), limit)] * (len(body.prompt) if isinstance(body, CompletionBody) else 1)
    return to_requests(body, "call", prompts, range(100, 100 + MAX_ANSWERS_PER_CALL))


def refusal(kind: Endpoint, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(kind, MINIMAL[kind] | fields)
    return caught.value


@pytest.mark.parametrize(("rule", "kind"), ROWS, ids=lambda row: row.name if isinstance(row, FieldRule) else row)
def test_each_row_of_the_field_table_is_treated_as_it_says(rule: FieldRule, kind: Endpoint) -> None:
    plain = parse(kind, MINIMAL[kind])
    if rule.name not in MINIMAL[kind]:
        assert parse(kind, MINIMAL[kind] | {rule.name: None}) == plain
    if rule.treatment == "ignored":
        anything: tuple[Any, ...] = ("x", 1, {"a": 1}, [None], True)
        for value in anything:
            assert parse(kind, MINIMAL[kind] | {rule.name: value}) == plain
    elif rule.treatment == "refused":
        for value in rule.accepts:
            assert parse(kind, MINIMAL[kind] | {rule.name: value}) == plain
        asking: tuple[Any, ...] = ("x", 17, {"type": "json_object"}, [{}])
        for value in asking:
            error = refusal(kind, **{rule.name: value})
            assert (error.param, error.code) == (rule.name, "unsupported_parameter")
            assert rule.name in str(error)
    else:
        assert rule.name in type(plain).model_fields


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_what_is_read_is_what_the_table_calls_used(kind: Endpoint) -> None:
    used = {rule.name for rule in TABLES[kind].values() if rule.treatment == "used"}
    assert used == set((ChatBody if kind == "chat" else CompletionBody).model_fields)


@pytest.mark.parametrize("name", USED)
def test_each_sampling_field_reaches_the_engine(name: str) -> None:
    value, attribute, expected = USED[name]
    for kind in [kind for kind, table in TABLES.items() if name in table]:
        params = requests_of(kind, **{name: value})[0].params
        assert getattr(params, attribute) == expected
        assert getattr(requests_of(kind)[0].params, attribute) != expected


def test_logprobs_have_one_meaning_behind_two_forms() -> None:
    assert requests_of("chat")[0].params.logprobs is None
    assert requests_of("chat", logprobs=False)[0].params.logprobs is None
    assert requests_of("chat", logprobs=True)[0].params.logprobs == 0
    assert requests_of("chat", logprobs=True, top_logprobs=20)[0].params.logprobs == 20
    assert requests_of("completion")[0].params.logprobs is None
    assert requests_of("completion", logprobs=0)[0].params.logprobs == 0
    assert requests_of("completion", logprobs=5)[0].params.logprobs == 5


def test_the_token_limit_has_two_names_for_chats_and_a_default_for_completions() -> None:
    assert token_limit(parse("chat", MINIMAL["chat"])) == (None, "max_tokens")
    both = MINIMAL["chat"] | {"max_tokens": 5, "max_completion_tokens": 5}
    assert token_limit(parse("chat", both)) == (5, "max_completion_tokens")
    assert token_limit(parse("completion", MINIMAL["completion"]))[0] == DEFAULT_COMPLETION_TOKENS


def test_a_given_seed_counts_up_over_choices_and_a_missing_one_is_drawn_for_each() -> None:
    prompts = ["a", "b"]
    given = requests_of("completion", prompt=prompts, n=2, seed=(1 << 63) - 1)
    assert [request.params.seed for request in given] == [(1 << 63) - 1, 1 << 63] * 2
    drawn = requests_of("completion", prompt=prompts, n=2)
    assert [request.params.seed for request in drawn] == [100, 101, 102, 103]
    assert [request.id for request in drawn] == [f"call-{index}" for index in range(4)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_has_four_forms(prompt: object, expected: object) -> None:
    body = parse("completion", {"prompt": prompt})
    assert isinstance(body, CompletionBody)
    assert body.prompt == expected


def test_content_parts_are_joined_and_harmless_message_fields_dropped() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "c",
        "refusal": None,
        "tool_calls": [],
        "annotations": [{"type": "url_citation"}],
        "audio": None,
        "unheard_of": None,
    }
    body = parse("chat", {"messages": [{"role": "developer", "content": parts}, echoed]})
    assert isinstance(body, ChatBody)
    expected = [{"role": "system", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert [message.model_dump() for message in body.messages] == expected


BAD: list[tuple[Endpoint, dict[str, Any], str | None]] = [
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": MESSAGES * (MAX_MESSAGES + 1)}, "messages"),
    ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ("chat", {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
    ("chat", {"messages": [7]}, "messages[0]"),
    ("chat", {"max_tokens": 0}, "max_tokens"),
    ("chat", {"max_tokens": "7"}, "max_tokens"),
    ("chat", {"max_tokens": 7.5}, "max_tokens"),
    ("chat", {"max_tokens": True}, "max_tokens"),
    ("chat", {"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ("chat", {"temperature": 2.1}, "temperature"),
    ("chat", {"temperature": -0.1}, "temperature"),
    ("chat", {"temperature": 10**400}, "temperature"),
    ("chat", {"temperature": float("nan")}, "temperature"),
    ("chat", {"top_p": 0}, "top_p"),
    ("chat", {"top_p": 1.1}, "top_p"),
    ("chat", {"top_k": -1}, "top_k"),
    ("chat", {"min_p": 1.1}, "min_p"),
    ("chat", {"seed": 1 << 63}, "seed"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": MAX_ANSWERS_PER_CALL + 1}, "n"),
    ("chat", {"stop": ""}, "stop"),
    ("chat", {"stop": [1]}, "stop"),
    ("chat", {"stop": ["x"] * (MAX_STOPS + 1)}, "stop"),
    ("chat", {"stop": "x" * (MAX_STOP_CHARS + 1)}, "stop"),
    ("chat", {"stop": ["a", "\ud83d"]}, "stop"),
    ("chat", {"presence_penalty": 3}, "presence_penalty"),
    ("chat", {"frequency_penalty": -3}, "frequency_penalty"),
    ("chat", {"logit_bias": {"a": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("chat", {"logit_bias": {"1": True}}, "logit_bias"),
    ("chat", {"logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias"),
    ("chat", {"logprobs": 3}, "logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ("chat", {"stream": "yes"}, "stream"),
    ("chat", {"model": 7}, "model"),
    ("chat", {"prompt": "x"}, "prompt"),
    ("completion", {"prompt": []}, "prompt"),
    ("completion", {"prompt": [[]]}, "prompt"),
    ("completion", {"prompt": [-1]}, "prompt"),
    ("completion", {"prompt": ["a", 1]}, "prompt"),
    ("completion", {"prompt": [True]}, "prompt"),
    ("completion", {"prompt": {"a": 1}}, "prompt"),
    ("completion", {"prompt": ["a"] * MAX_ANSWERS_PER_CALL, "n": 2}, "prompt"),
    ("completion", {"logprobs": 6}, "logprobs"),
    ("completion", {"logprobs": True}, "logprobs"),
    ("completion", {"messages": MESSAGES}, "messages"),
]


@pytest.mark.parametrize(("kind", "fields", "param"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_a_bad_value_is_refused_with_its_field(kind: Endpoint, fields: dict[str, Any], param: str) -> None:
    assert refusal(kind, **fields).param == param


def test_bounds_themselves_are_allowed() -> None:
    stops = ["x" * MAX_STOP_CHARS] * MAX_STOPS
    biases = {str(token): -100 for token in range(MAX_LOGIT_BIAS)}
    requests = requests_of(
        "chat", n=MAX_ANSWERS_PER_CALL, stop=stops, logit_bias=biases, temperature=2, top_k=0, seed=-(1 << 63)
    )
    assert len(requests) == MAX_ANSWERS_PER_CALL


def test_a_refusal_names_limit_value_and_near_misses() -> None:
    assert "less than or equal to 2, got 3.5" in str(refusal("chat", temperature=3.5))
    unknown = refusal("chat", tempurature=1)
    assert (unknown.param, unknown.code) == ("tempurature", "unknown_parameter")
    assert "did you mean 'temperature'?" in str(unknown)
    with pytest.raises(InvalidRequest) as missing:
        parse("chat", {})
    assert (missing.value.param, missing.value.code) == ("messages", "missing_required_parameter")
    assert len(str(refusal("chat", seed="x" * 100_000))) < 500


@pytest.mark.parametrize("payload", [None, [], "x", 7, [[[]]]])
def test_a_body_that_is_no_object_is_refused(payload: object) -> None:
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        parse("chat", payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100)
@given(kind=st.sampled_from(["chat", "completion"]), data=st.data())
def test_any_json_is_a_body_or_a_refusal_and_nothing_else(kind: Endpoint, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(TABLES[kind])), JSON, max_size=3))
    outcome: object
    try:
        outcome = parse(kind, MINIMAL[kind] | changes)
    except InvalidRequest as refused:
        outcome = refused
    if isinstance(outcome, InvalidRequest):
        assert outcome.param is None or outcome.param.split(".")[0].split("[")[0] in TABLES[kind]
        assert len(str(outcome)) < 600
    else:
        assert isinstance(outcome, ChatBody | CompletionBody)


WORDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"content": "x", "name": "Ann"}, {"content": "x", "name": "Ann"}),
    ({"content": "x", "reasoning_content": "so"}, {"content": "x", "reasoning_content": "so"}),
    ({"content": []}, {"content": ""}),
    ({"content": None, "refusal": "no"}, {"content": "no"}),
    ({"content": [{"type": "refusal", "refusal": "no"}]}, {"content": "no"}),
    ({"content": "x", "refusal": None, "audio": None, "unheard_of": None}, {"content": "x"}),
]


@pytest.mark.parametrize(("said", "read"), WORDS, ids=str)
def test_what_clients_send_back_of_an_assistants_message_is_read(said: dict[str, Any], read: dict[str, Any]) -> None:
    body = parse("chat", {"messages": [*MESSAGES, {"role": "assistant"} | said]})
    assert isinstance(body, ChatBody)
    assert body.messages[1].model_dump() == {"role": "assistant"} | read


def make_call(
    kind: Endpoint, n: int = 1, logprobs: int | None = None, *, stream: bool = False, usage: bool = False
) -> TextCall:
    params = SamplingParams(max_tokens=9, logprobs=logprobs)
    requests = tuple(Request(f"c-{index}", (1, 2, 3), params) for index in range(n))
    return TextCall("c", kind, "toy", 1_700_000_000, "print", requests, n, stream, usage)


def token(text: bytes, logprob: float = -0.5) -> TokenLogprob:
    return TokenLogprob(7, text, logprob, ((7, text, logprob), (8, b"\xff", float("-inf"))))


def answer_events(logprobs: bool) -> list[Event]:
    """Two choices, interleaved; the second's "é" comes in two tokens."""
    texts = {"c-0": [(b"ab", "ab"), (b"c", "c")], "c-1": [(b"x", "x"), (b"\xc3", ""), (b"\xa9", "é"), (b"!", "!")]}
    events: list[Event] = []
    for name, tokens in texts.items():
        events += [TextDelta(name, text, (7,), (token(raw),) if logprobs else ()) for raw, text in tokens]
        events.append(Finished(name, "stop" if name == "c-0" else "length", Usage(3, len(name) - 1, len(tokens))))
    order = random.Random(3).sample(["c-0"] * 3 + ["c-1"] * 5, 8)
    return [events.pop(next(i for i, event in enumerate(events) if event.request_id == name)) for name in order]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_with_continuous_usage_every_chunk_counts_the_tokens_so_far(kind: Endpoint) -> None:
    answer = TextAnswer(replace(make_call(kind, 2, stream=True, usage=True), continuous_usage=True))
    chunks: list[Any] = list(answer.begin())
    for event in answer_events(logprobs=False):
        chunks += answer.feed(event)
    last: list[Any] = list(answer.end())[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == (0 if kind == "chat" else 1)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}
    assert "prompt_tokens_details" not in chunks[-2]["usage"]
    assert last[0]["usage"] == chunks[-1]["usage"] == answer.usage()
    assert counts[-1] == 6


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_chunks_of_a_stream_add_up_to_the_whole_answer(kind: Endpoint, logprobs: int | None) -> None:
    events = answer_events(logprobs is not None)
    whole = TextAnswer(make_call(kind, 2, logprobs))
    streamed = TextAnswer(make_call(kind, 2, logprobs, stream=True, usage=True))
    chunks: list[Any] = list(streamed.begin())
    for event in events:
        whole.feed(event)
        chunks += streamed.feed(event)
    *last, done = streamed.end()
    assert done == DONE
    chunks += last
    response = json.loads(json.dumps(whole.response(), allow_nan=False))
    (ChatCompletion if kind == "chat" else Completion).model_validate(response)
    assert [choice["index"] for choice in response["choices"]] == [0, 1]
    assert chunks[-1]["usage"] == response["usage"]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in response["choices"]:
        assert fold_chunks(kind, chunks, choice["index"]) == choice


def fold_chunks(kind: Endpoint, chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """A client's own fold, written apart from ours."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    if kind == "chat":
        ChatCompletionChunk.model_validate(chunks[0])
    logprobs: dict[str, Any] | None = None
    for found in filter(None, (part["logprobs"] for part in parts)):
        if logprobs is None:
            logprobs = {name: value if value is None else [] for name, value in found.items()}
        for name, value in found.items():
            logprobs[name] = value if value is None else logprobs[name] + value
    if kind == "chat":
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(part["delta"].get("content", "") for part in parts)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    else:
        said = {"text": "".join(part["text"] for part in parts)}
    reasons = [part["finish_reason"] for part in parts if part["finish_reason"]]
    assert len(reasons) == 1
    return {"index": index} | said | {"logprobs": logprobs, "finish_reason": reasons[0]}


def test_logprobs_in_both_forms() -> None:
    chat, completion = TextAnswer(make_call("chat", 2, 2)), TextAnswer(make_call("completion", 2, 2))
    for event in answer_events(logprobs=True):
        chat.feed(event)
        completion.feed(event)
    first = chat.response()["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("ab", -0.5, [97, 98])
    assert first["top_logprobs"][1] == {"token": "\ufffd", "logprob": -9999.0, "bytes": [255]}
    second = completion.response()["choices"][1]["logprobs"]
    assert second["tokens"] == ["x", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert second["text_offset"] == [0, 1, 1, 2]
    assert second["top_logprobs"][0] == {"x": -0.5, "bytes:\\xff": -9999.0}


def test_usage_counts_a_shared_prompt_once_and_as_cached_what_nobody_computed() -> None:
    answer = TextAnswer(make_call("chat", 2))
    answer.feed(Finished("c-0", "stop", Usage(100, 60, 5)))
    answer.feed(Finished("c-1", "stop", Usage(100, 99, 7)))
    assert answer.usage() == {
        "prompt_tokens": 100,
        "completion_tokens": 12,
        "total_tokens": 112,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def test_a_failed_choice_fails_the_answer() -> None:
    with pytest.raises(DecodeFailed, match="broken"):
        TextAnswer(make_call("chat", 2)).feed(Failed("c-1", DecodeFailed("broken")))


def test_text_without_news_makes_no_chunk() -> None:
    answer = TextAnswer(make_call("chat", stream=True))
    assert list(answer.feed(TextDelta("c-0", "", (7,)))) == []


def test_offsets_count_whole_characters() -> None:
    offsets = TextOffsets()
    pieces = [b"a", "é€".encode()[:3], "é€".encode()[3:], b"z"]
    assert [offsets.take(piece) for piece in pieces] == [0, 1, 2, 3]
