"""The confidence beside an answer's own fields, as the official client reads it: where it is and what it says."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from models.calibration.record import Calibration, Promise
from models.manifest import Manifest, Prompt
from runtime.config import RuntimeConfig
from runtime.errors import LoadFailed
from runtime.openai.confidence import PromisedLabels
from runtime.serving.promise import is_as_trained, promised_labels, require_target
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import Running, serving

LABELS = ("billing", "spam", "support")
CALIBRATION = Calibration(
    examples=400,
    right=380,
    temperature=2.0,
    ece_before=0.05,
    ece_after=0.01,
    target=0.95,
    promises=(
        Promise(target=0.95, threshold=0.8, automatic=300, right=297, bound=0.97),
        Promise(target=0.99, needed=3000),
    ),
)
MANIFEST = Manifest(
    name="toy",
    licence="none",
    task="classify",
    labels=LABELS,
    prompt=Prompt(template="Mail: {text}"),
    calibration=CALIBRATION,
)
KEEPING = RuntimeConfig(slots=4, target=0.95)
ASKED: Any = [{"role": "user", "content": "Mail: a mail"}]
QUESTION: Any = {"type": "choice", "instructions": "Which?", "choices": [{"value": label} for label in LABELS[::-1]]}


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=1024, script="spam"), config=KEEPING, manifest=MANIFEST) as running:
        yield running


def told(toy: Running, messages: Any = ASKED, **fields: Any) -> Any:
    """What is beside the choice's own fields."""
    completion = toy.client().chat.completions.create(model="toy", messages=messages, temperature=0, **fields)
    assert completion.choices[0].finish_reason == "stop"
    return (completion.choices[0].model_extra or {}).get("deskside")


def decided(toy: Running, question: Any = QUESTION, text: Any = "a mail") -> Any:
    [answer] = toy.client().decisions.create(model="toy", input=text, questions=[question]).answers
    assert answer.type == "choice"
    return answer


def test_chat_and_decision_say_how_sure_the_label_is_beside_their_own_fields(toy: Running) -> None:
    sure = told(toy)
    assert sure.keys() == {"confidence", "automatic", "target"}
    assert (sure["automatic"], sure["target"]) == (True, 0.95)
    assert 0.8 <= sure["confidence"] <= 1
    answer = decided(toy)
    assert answer.choice == "spam"
    assert answer.model_extra["deskside"] == pytest.approx(sure, abs=1e-4)
    assert answer.confidence >= sure["confidence"], "OpenAI's own field is the model's probability, not calibrated"


def test_without_a_target_a_chat_computes_nothing_for_it_and_a_decision_tells_it() -> None:
    with serving(FakeLlama(n_ctx=1024, script="spam"), manifest=MANIFEST) as toy:
        assert told(toy) is None
        assert decided(toy).model_extra["deskside"]["target"] == CALIBRATION.target


def test_the_last_chunk_of_a_stream_says_the_same(toy: Running) -> None:
    chunks = list(toy.client().chat.completions.create(model="toy", messages=ASKED, temperature=0, stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "spam"
    assert [choice.finish_reason for choice in choices if choice.model_extra] == ["stop"]
    assert (choices[-1].model_extra or {})["deskside"] == told(toy)


def test_a_choice_among_all_labels_says_it_and_among_some_does_not(toy: Running) -> None:
    assert told(toy, extra_body={"choice": list(LABELS)}) == pytest.approx(told(toy), abs=1e-4)
    assert told(toy, extra_body={"guided_choice": list(LABELS)}) is not None
    assert told(toy, extra_body={"choice": ["spam", "support"]}) is None
    some = QUESTION | {"choices": [{"value": "spam"}, {"value": "support"}]}
    assert not decided(toy, some).model_extra


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a mail"}],
        [{"role": "system", "content": "Be brief."}, *ASKED],
        [*ASKED, {"role": "assistant", "content": "spam"}, *ASKED],
    ],
)
def test_asked_otherwise_than_calibrated_nothing_is_promised(toy: Running, messages: Any) -> None:
    assert told(toy, messages) is None


def test_each_of_several_choices_has_its_own_confidence(toy: Running) -> None:
    several = toy.client().chat.completions.create(model="toy", messages=ASKED, temperature=0, n=2)
    assert [(choice.model_extra or {})["deskside"] for choice in several.choices] == [told(toy)] * 2


def test_what_is_no_label_or_of_no_calibrated_model_promises_nothing() -> None:
    with serving(FakeLlama(n_ctx=1024, script="hello"), config=KEEPING, manifest=MANIFEST) as toy:
        assert told(toy) is None
    bare = MANIFEST.model_copy(update={"calibration": None})
    with serving(FakeLlama(n_ctx=1024, script="spam"), config=KEEPING, manifest=bare) as toy:
        assert told(toy) is None
        assert not decided(toy).model_extra


def test_a_plain_label_takes_no_more_steps_than_without_calibration() -> None:
    steps = []
    for manifest in (MANIFEST, MANIFEST.model_copy(update={"calibration": None})):
        llama = FakeLlama(n_ctx=1024, script="spam")
        with serving(llama, config=KEEPING, manifest=manifest) as toy:
            toy.client().chat.completions.create(model="toy", messages=ASKED, temperature=0)
        steps.append(len(llama.batches))
    assert steps[0] == steps[1]


def test_the_target_chooses_the_threshold() -> None:
    promise = promised_labels(MANIFEST, None)
    assert promise == PromisedLabels(LABELS, 2.0, 0.95, 0.8)
    never = promised_labels(MANIFEST, 0.99)
    assert never is not None
    sure = never.confidence("spam", LABELS, (-30.0, 0.0, -30.0))
    assert sure is not None
    assert sure["confidence"] == pytest.approx(1)
    assert not sure["automatic"], "no threshold is proved for it"
    assert promised_labels(MANIFEST, 0.9) is None
    assert promised_labels(None, None) is None


def test_a_confidence_is_that_of_the_label_given_at_the_temperature() -> None:
    promise = PromisedLabels(LABELS, 2.0, 0.95, 0.5)
    sure = promise.confidence("support", ("spam", "support", "billing"), (0.0, -2.0, -4.0))
    weights = [1.0, 2.718281828459045**-1, 2.718281828459045**-2]
    assert sure is not None
    assert sure["confidence"] == pytest.approx(weights[1] / sum(weights))
    assert not sure["automatic"]


def test_a_target_that_no_model_can_keep_is_refused_with_the_way_to_it() -> None:
    require_target({"toy": MANIFEST, "base": None}, 0.95)
    require_target({"base": None}, None)
    with pytest.raises(LoadFailed, match=r"--target 0.9: 'toy' has thresholds for 0.95, 0.99 only.*convert it"):
        require_target({"toy": MANIFEST}, 0.9)
    with pytest.raises(LoadFailed, match=r"'base' has no calibration.*--examples FILE --target 0.9"):
        require_target({"base": None}, 0.9)


def test_a_system_message_that_was_trained_belongs_to_the_form() -> None:
    prompt = Prompt(template="Mail: {text}", system="Sort.")
    whole = [("system", "Sort."), ("user", "Mail: x")]
    assert is_as_trained(whole, prompt, wrapped=True)
    assert not is_as_trained(whole[1:], prompt, wrapped=True)
    assert is_as_trained([("user", "x")], prompt, wrapped=False)
    assert not is_as_trained([], prompt, wrapped=False)


def test_the_openapi_document_has_the_fields(toy: Running) -> None:
    schemas = toy.http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatChoice", "ChatChunkChoice", "ChoiceAnswer"):
        assert json.dumps(schemas[name]).count("LabelConfidence") == 1
