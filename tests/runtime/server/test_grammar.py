"""Structured output over HTTP, by the official client: it parses, streams, repeats, and refuses before it begins."""

import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from models.manifest import Manifest
from runtime.decoding.grammar import Grammars, GrammarState
from runtime.requests import Grammar
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import Running, serving

MESSAGES: list[Any] = [{"role": "user", "content": "which list?"}]
CHAT = "/v1/chat/completions"
LISTS = ["exmh-users", "exmh-workers", "spam"]


class Mail(BaseModel):
    label: Literal["spam", "ham"]
    urgent: bool


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """A server whose model says anything."""
    with serving(FakeLlama(n_ctx=2048)) as running:
        yield running


def test_the_clients_parse_gets_its_type(noisy: Running) -> None:
    chat = noisy.client().chat.completions
    for seed in range(5):
        answer = chat.parse(model="toy", messages=MESSAGES, response_format=Mail, seed=seed).choices[0]
        assert isinstance(answer.message.parsed, Mail)
        assert answer.finish_reason == "stop"


def test_choices_with_n_seed_logprobs_and_stream(noisy: Running) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "choice": LISTS, "n": 8, "seed": 7, "temperature": 1.5}
    whole = noisy.http.post(CHAT, json=body).raise_for_status().json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert set(texts) <= set(LISTS)
    assert len(set(texts)) > 1
    again = noisy.http.post(CHAT, json=body | {"logprobs": True, "top_logprobs": 1}).json()
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    spelled = ["".join(t["token"] for t in choice["logprobs"]["content"]) for choice in again["choices"]]
    assert spelled == texts
    assert again["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == sum(map(len, texts))
    streamed = [""] * 8
    with noisy.http.stream("POST", CHAT, json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


def test_a_stop_string_works_within_a_grammar(noisy: Running) -> None:
    body = {"prompt": "x", "regex": "ab(c|d)ef", "stop": "e", "max_tokens": 9}
    answer = noisy.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
    assert (answer["text"] in ("abc", "abd"), answer["finish_reason"]) == (True, "stop")


NUMBER = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"guided_json": NUMBER}, {'{"n": 7}'}),
        ({"guided_json": json.dumps(NUMBER)}, {'{"n": 7}'}),
        ({"guided_regex": "[ab]c"}, {"ac", "bc"}),
        ({"guided_choice": LISTS, "guided_decoding_backend": "outlines"}, set(LISTS)),
        ({"guided_grammar": 'root ::= "a" | "b"'}, {"a", "b"}),
        ({"structured_outputs": {"json": NUMBER, "regex": None}}, {'{"n": 7}'}),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, {"a", "b"}),
        ({"structured_outputs": {"choice": LISTS}}, set(LISTS)),
    ],
)
def test_a_form_under_vllms_names_holds(noisy: Running, form: dict[str, Any], answers: set[str], stream: bool) -> None:
    chat = noisy.client().chat.completions
    if stream:
        chunks = chat.create(model="toy", messages=MESSAGES, seed=3, stream=True, extra_body=form)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = chat.create(model="toy", messages=MESSAGES, seed=3, extra_body=form).choices[0].message.content or ""
    assert text in answers


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": MESSAGES, "regex": "(a"}, "regex"),
        (CHAT, {"messages": MESSAGES, "grammar": "start: missing"}, "grammar"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}, "choice": ["a"]}, "choice"),
        ("/v1/completions", {"prompt": "x", "choice": []}, "choice"),
        (CHAT, {"messages": MESSAGES, "guided_json": {"type": "objekt"}}, "guided_json"),
        (CHAT, {"messages": MESSAGES, "structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ("/v1/completions", {"prompt": "x", "regex": "a" * 70_000}, "regex"),
        (
            CHAT,
            {
                "messages": MESSAGES,
                "stream": True,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}},
            },
            "response_format",
        ),
    ],
)
def test_what_cannot_be_used_is_a_400_before_the_engine_sees_it(
    noisy: Running, path: str, body: dict[str, Any], param: str
) -> None:
    decodes = noisy.llama.decodes
    response = noisy.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert noisy.llama.decodes == decodes


def test_others_are_answered_while_the_first_grammar_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the tokenizer ready and compiling happen off the event loop."""
    arrived, go_on = threading.Event(), threading.Event()
    compile_grammar = Grammars.compile

    def slowly(self: Grammars, grammar: Grammar) -> GrammarState:
        arrived.set()
        assert go_on.wait(60)
        return compile_grammar(self, grammar)

    monkeypatch.setattr(Grammars, "compile", slowly)
    with serving(FakeLlama(script="hello")) as toy:
        answers: list[Any] = []
        body = {"prompt": "x", "choice": ["hello"]}
        first = threading.Thread(target=lambda: answers.append(toy.http.post("/v1/completions", json=body)))
        first.start()
        assert arrived.wait(60)
        plain = toy.http.post("/v1/completions", json={"prompt": "x"})
        assert plain.json()["choices"][0]["text"] == "hello"
        assert not answers
        go_on.set()
        first.join()
        assert answers[0].json()["choices"][0]["text"] == "hello"


OPEN = {"type": "object", "properties": {"n": {"type": "integer"}, "o": {"properties": {"k": {"type": "number"}}}}}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_json_is_spaced_as_the_model_learnt_it_and_closed(path: str, compact: bool) -> None:
    """A model that would say anything still ends: with own keys, short numbers and the white space it knows."""
    manifest = Manifest(name="toy", licence="MIT", compact_json=compact)
    schema = OPEN | {"required": ["n", "o"]}
    body: dict[str, Any] = {"messages": MESSAGES, "response_format": _format(schema)}
    if path != CHAT:
        body = {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    with serving(FakeLlama(n_ctx=2048), manifest=manifest) as toy:
        for seed in range(4):
            whole = toy.http.post(path, json=body | {"seed": seed}).raise_for_status().json()
            text = (
                whole["choices"][0]["message"]["content"] if path == CHAT else whole["output"][0]["content"][0]["text"]
            )
            answer = json.loads(text)
            assert set(answer) == {"n", "o"}
            assert set(answer["o"]) <= {"k"}
            assert abs(answer["n"]) < 10**16
            assert text.startswith('{"n":' if compact else '{"n": ')
            assert (" " in text) is not compact


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
