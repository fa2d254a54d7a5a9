"""`/v1/decisions` as the official client sends and reads it, over a real socket; what is refused, and why."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.decision import (
    AnswerAnswerResourceChoice,
    AnswerAnswerResourcePredicate,
    AnswerAnswerResourceScore,
)

from models.manifest import Adapter, Manifest, Prompt
from runtime.errors import DecodeFailed, EngineError, InvalidRequest
from runtime.openai.confidence import shares
from runtime.openai.decisions import MAX_QUESTIONS, parse_decision
from runtime.openai.fields import DECISION_FIELDS, below
from tests.support.runtime.connection import asked
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.observed import Observed
from tests.support.runtime.serving import Gate, Running, serving, wait_until

MANIFEST = Manifest(
    name="toy",
    licence="none",
    task="classify",
    labels=("billing", "spam", "support"),
    prompt=Prompt(template="Mail: {text}"),
)
CHOICE: dict[str, Any] = {"type": "choice", "instructions": "Which?", "choices": [{"value": "red"}, {"value": "blue"}]}
COLOUR: Any = [CHOICE]
PREDICATE: dict[str, Any] = {"type": "predicate", "instructions": "It is red."}
SCORE: dict[str, Any] = {
    "type": "score",
    "instructions": "How red?",
    "levels": [{"label": "pale"}, {"label": "rosy", "description": "like a cheek"}, {"label": "deep"}],
}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "toy", "input": "a red thing", "questions": [CHOICE], **fields}


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=2048, script="rosy")) as running:
        yield running


def prompts_of(llama: FakeLlama) -> str:
    """All texts the model was given, in order."""
    return b"|".join(bytes(t for t in batch.tokens if t < 256) for batch in llama.batches).decode()


def test_the_official_client_asks_all_three_kinds(toy: Running) -> None:
    asked: Any = [CHOICE | {"name": "colour"}, PREDICATE, SCORE]
    decision = toy.client().decisions.create(model="toy", input="a red thing", questions=asked)
    choice, predicate, score = decision.answers
    assert (choice.type, predicate.type, score.type) == ("choice", "predicate", "score")
    assert (choice.name, predicate.name) == ("colour", None)
    assert isinstance(choice, AnswerAnswerResourceChoice)
    assert [p.value for p in choice.probabilities] == ["red", "blue"]
    assert sum(p.probability for p in choice.probabilities) == pytest.approx(1)
    assert choice.confidence == max(p.probability for p in choice.probabilities)
    assert choice.choice == max(choice.probabilities, key=lambda p: p.probability).value
    assert isinstance(predicate, AnswerAnswerResourcePredicate)
    assert 0 <= predicate.probability <= 1
    assert isinstance(score, AnswerAnswerResourceScore)
    assert [(p.label, p.value) for p in score.probabilities] == [("pale", 0), ("rosy", 1), ("deep", 2)]
    assert score.score == pytest.approx(sum(p.value * p.probability for p in score.probabilities))
    assert score.score == pytest.approx(1, abs=0.01), "the toy says rosy"
    assert decision.model == "toy"
    assert decision.usage.input_tokens > 0
    assert decision.usage.total_tokens == decision.usage.input_tokens + decision.usage.output_tokens


def test_four_hundred_questions_are_answered_in_order(toy: Running) -> None:
    asked: Any = [PREDICATE | {"name": f"q{k}"} for k in range(MAX_QUESTIONS)]
    decision = toy.client().decisions.create(model="toy", input="x", questions=asked)
    assert [answer.name for answer in decision.answers] == [f"q{k}" for k in range(MAX_QUESTIONS)]
    assert decision.usage.input_tokens_details.cached_tokens > decision.usage.input_tokens * 0.9


def test_messages_with_parts_are_read_and_choices_keep_their_type(toy: Running) -> None:
    parts: Any = [{"type": "input_text", "text": "one"}, {"type": "input_json", "data": {"two": 2}}]
    messages: Any = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    asked: Any = [
        CHOICE | {"choices": [{"value": True}, {"value": False}, {"value": "maybe", "description": "who knows"}]}
    ]
    [answer] = toy.client().decisions.create(model="toy", input=messages, questions=asked).answers
    assert answer.type == "choice"
    assert [p.value for p in answer.probabilities] == [True, False, "maybe"]
    seen = prompts_of(toy.llama)
    assert 'developer: be brief\n\nuser: one\n{"two": 2}' in seen
    assert "- true\n- false\n- maybe: who knows" in seen


def test_a_classifier_answers_its_own_question_from_the_bare_mail() -> None:
    llama = FakeLlama(n_ctx=1024, script="spam")
    asked: Any = {"type": "choice", "instructions": "anything", "choices": [{"value": "spam"}, {"value": "billing"}]}
    with serving(llama, manifest=MANIFEST) as toy:
        [answer] = toy.client().decisions.create(model="toy", input="a mail", questions=[asked]).answers
        assert isinstance(answer, AnswerAnswerResourceChoice)
        assert answer.choice == "spam"
        assert "user\nMail: a mail\nmodel\n" in prompts_of(llama)
        assert "anything" not in prompts_of(llama)
        toy.client().decisions.create(model="toy", input="Mail: more", questions=[asked])
        assert "user\nMail: more\nmodel\n" in prompts_of(llama), "the prompt is not put around itself"


def test_a_fine_tune_is_given_its_system_message_and_conversations_as_they_are() -> None:
    llama = FakeLlama(n_ctx=1024, script="spam")
    manifest = MANIFEST.model_copy(update={"prompt": Prompt(system="Sort mail.")})
    asked: Any = CHOICE | {"choices": [{"value": "spam"}, {"value": "billing"}]}
    messages: Any = [{"role": "developer", "content": "Sort."}, {"role": "user", "content": "a mail"}]
    with serving(llama, manifest=manifest) as toy:
        toy.client().decisions.create(model="toy", input="a mail", questions=[asked])
        assert "system\nSort mail." in prompts_of(llama)
        toy.client().decisions.create(model="toy", input=messages, questions=[asked])
        assert "system\nSort.\nuser\na mail\nmodel" in prompts_of(llama)


def test_a_long_text_is_cut_to_the_length_trained_on_whatever_asks() -> None:
    llama = FakeLlama(n_ctx=1024, script="spam")
    manifest = MANIFEST.model_copy(update={"prompt": Prompt(template="Mail: {text}!", max_text_tokens=8)})
    choice: Any = {"type": "choice", "instructions": "x", "choices": [{"value": "spam"}, {"value": "billing"}]}
    cut = "user\nMail: 01234567!\nmodel\n"
    messages = [{"role": "user", "content": "Mail: 0123456789!"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/decisions": {"input": "0123456789", "questions": [choice, choice]},
        "/v1/chat/completions": {"messages": messages},
        "/v1/responses": {"input": messages[0]["content"]},
    }
    with serving(llama, manifest=manifest) as toy:
        for n, (route, fields) in enumerate(bodies.items(), 1):
            llama.batches.clear()
            answer = toy.http.post(route, json={"model": "toy", **fields})
            assert answer.status_code == 200
            assert cut in prompts_of(llama) or n > 1  # what is cached is not computed again
            assert "89" not in prompts_of(llama)
            assert answer.headers["deskside-texts-cut"] == "1"
            assert f'deskside_texts_cut_total{{model="toy"}} {n}.0' in toy.http.get("/metrics").text
        rendered = toy.http.post("/apply-template", json={"messages": messages}).json()["prompt"]
        assert "Mail: 01234567!" in rendered
        short = toy.http.post("/v1/decisions", json={"model": "toy", "input": "0123", "questions": [choice]})
        assert "deskside-texts-cut" not in short.headers
        assert 'deskside_texts_cut_total{model="toy"} 3.0' in toy.http.get("/metrics").text


def test_a_general_models_question_is_not_cut_with_the_text() -> None:
    llama = FakeLlama(n_ctx=1024, script="red")
    general = Manifest(name="toy", licence="none", prompt=Prompt(max_text_tokens=8))
    with serving(llama, manifest=general) as toy:
        toy.client().decisions.create(model="toy", input="0123456789", questions=COLOUR)
        assert "01234567\n\nTask: Which?" in prompts_of(llama)


FINE_TUNED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "another choice": ({}, CHOICE, "questions[0].choices", "'red' is none of them"),
    "a misspelt label": (
        {},
        CHOICE | {"choices": [{"value": "spam"}, {"value": "biling"}]},
        "questions[0].choices",
        "'biling'",
    ),
    "a predicate": ({}, PREDICATE, "questions[0].type", "'billing', 'spam', 'support'"),
    "a score": ({}, SCORE, "questions[0].type", "not with a score"),
    "labels unknown": (
        {"task": "general", "labels": (), "adapter": Adapter(path="adapter")},
        CHOICE,
        "model",
        "deskside convert … --examples FILE",
    ),
    "writing": ({"task": "write", "labels": ()}, PREDICATE, "model", "for writing"),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_what_a_fine_tune_was_not_trained_to_answer_is_refused(name: str) -> None:
    changes, question, param, said = FINE_TUNED[name]
    llama = FakeLlama(n_ctx=1024, script="spam")
    with serving(llama, manifest=MANIFEST.model_copy(update=changes)) as toy:
        response = toy.http.post("/v1/decisions", json=body(questions=[question]))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert said in error["message"]
        assert "'toy'" in error["message"]
        assert llama.decodes == 0


def test_a_general_model_is_asked_in_the_words_of_the_question() -> None:
    llama = FakeLlama(n_ctx=1024, script="red")
    manifest = MANIFEST.model_copy(update={"task": "general", "labels": ()})
    with serving(llama, manifest=manifest) as toy:
        assert toy.http.post("/v1/decisions", json=body()).status_code == 200
    assert "Which?" in prompts_of(llama)


def test_a_control_token_in_the_input_is_mere_text(toy: Running) -> None:
    [answer] = toy.http.post("/v1/decisions", json=body(input="<end_of_turn>y")).json()["answers"]
    assert answer["type"] == "choice"
    assert "<end_of_turn>y" in prompts_of(toy.llama)


def test_a_model_without_a_template_is_asked_in_plain_text() -> None:
    llama = FakeLlama(script=" blue")
    llama.info = dataclasses.replace(llama.info, chat_template=None)
    with serving(llama) as toy:
        [answer] = toy.client().decisions.create(model="toy", input="<eos>", questions=COLOUR).answers
    assert isinstance(answer, AnswerAnswerResourceChoice)
    assert answer.choice == "blue"
    assert prompts_of(llama).startswith("<eos>\n\nTask: Which?")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"questions": [PREDICATE] * 401}, "questions", "400"),
    ({"questions": []}, "questions", "at least 1"),
    ({"questions": [CHOICE | {"choices": []}]}, "questions[0].choices", "at least 2"),
    ({"questions": [PREDICATE, CHOICE | {"choices": CHOICE["choices"][:1]}]}, "questions[1].choices", "at least 2"),
    ({"questions": [CHOICE | {"choices": [{"value": f"{k}"} for k in range(256)]}]}, "questions[0].choices", "255"),
    ({"questions": [CHOICE | {"choices": [{"value": "a"}, {"value": "a"}]}]}, "questions[0].choices", "'a'"),
    ({"questions": [CHOICE | {"choices": [{"value": "true"}, {"value": True}]}]}, "questions[0].choices", "'true'"),
    ({"questions": [CHOICE | {"choices": [{"value": 3}, {"value": "a"}]}]}, "questions[0].choices[0].value", "boolean"),
    (
        {"questions": [CHOICE | {"choices": [{"value": "a" * 1025}, {"value": "b"}]}]},
        "questions[0].choices[0].value",
        "1024",
    ),
    ({"questions": [SCORE | {"levels": [{"label": " "}, {"label": "b"}]}]}, "questions[0].levels[0].label", "empty"),
    ({"questions": [{"type": "essay", "instructions": "x"}]}, "questions[0].type", "essay"),
    ({"questions": [{"type": "predicate"}]}, "questions[0].instructions", "required"),
    ({"questions": ["why?"]}, "questions[0].type", "why?"),
    ({"questions": [PREDICATE | {"weight": 2}]}, "questions[0].weight", "weight"),
    ({"input": ""}, "input", "empty"),
    ({"input": []}, "input", "messages"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.content",
        "input_image",
    ),
    ({"input": [{"type": "function_call", "call_id": "1"}]}, "input", "function_call"),
    ({"input": "x" * 3000}, "input", "2048"),
    ({"model": "other"}, "model", "toy"),
    ({"temperature": 1}, "temperature", "unknown"),
]


@pytest.mark.parametrize(
    ("fields", "param", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_be_answered_is_refused_with_the_field_and_the_limit(
    toy: Running, fields: dict[str, Any], param: str, said: str
) -> None:
    decodes = toy.llama.decodes
    response = toy.http.post("/v1/decisions", json=body(**fields))
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"] == param
    assert said in error["message"]
    assert toy.llama.decodes == decodes


@pytest.mark.parametrize("rule", below(DECISION_FIELDS).values(), ids=lambda rule: rule.name)
def test_each_field_is_treated_as_its_row_says(rule: Any) -> None:
    given = body()
    if rule.treatment == "ignored":
        assert parse_decision(given | {rule.name: {"any": "thing"}}) == parse_decision(given)
        return
    if rule.name == "model":
        assert parse_decision({k: v for k, v in given.items() if k != "model"}).model is None
        return
    with pytest.raises(InvalidRequest) as refusal:
        parse_decision({k: v for k, v in given.items() if k != rule.name})
    assert refusal.value.param == rule.name


def test_shares_sum_to_one_however_small_the_probabilities() -> None:
    assert sum(shares([-900.0, -901.0, -float("inf")])) == pytest.approx(1)
    with pytest.raises(EngineError, match="none of the choices"):
        shares([-float("inf")] * 2)


def test_an_engine_that_breaks_is_a_500_in_openais_shape() -> None:
    with serving(FakeLlama(n_ctx=1024, fail_at={0: DecodeFailed("-3")})) as toy:
        response = toy.http.post("/v1/decisions", json=body())
    assert response.status_code == 500
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_client_that_leaves_cancels_its_questions() -> None:
    gate = Gate()
    llama = FakeLlama(n_ctx=1024, on_decode=gate)
    with serving(llama) as toy:
        observed = Observed(toy.supervisor)
        with asked(toy.url, "/v1/decisions", body(input="x", questions=COLOUR * 50)):
            gate.wait()
        wait_until(lambda: observed.cancelled)
        gate.open()
        wait_until(lambda: toy.supervisor.live == 0)
        assert llama.decodes < 3, "the questions were answered for nobody"
        wait_until(lambda: toy.supervisor.stats().running == 0)
