"""Written answers that are labels: their probabilities are those of a scoring request, at no step where rows tell."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.decoding.choice_tree import NEGLIGIBLE
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import InvalidRequest
from runtime.requests import (
    Failed,
    Finished,
    Grammar,
    Request,
    SamplingParams,
    Scored,
    Scoring,
    ScoringPrompt,
    TextDelta,
)
from tests.support.runtime.fakes import BOS, END_OF_TURN, EOS, FakeLlama, FakeTokenizer

ENDS = (EOS, END_OF_TURN)
GRAMMARS = Grammars(FakeTokenizer())
LABELS = ("spam", "spamassassin", "fork", "forks", "ilug")


def tokens_of(labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(label.encode()) for label in labels)


def chat(name: str, labels: tuple[str, ...] = LABELS, **params: object) -> Request:
    sampling = SamplingParams(**{"max_tokens": 16, "temperature": 0, **params})  # type: ignore[arg-type]
    return Request(name, (BOS, *b"a mail:"), sampling, labels=tokens_of(labels))


def scoring(labels: tuple[str, ...] = LABELS) -> Scoring:
    return Scoring("scoring", (ScoringPrompt((BOS, *b"a mail:"), tokens_of(labels), ENDS),))


def run(engine: Engine, *work: Request | Scoring) -> dict[str, Finished | Scored | Failed]:
    for one in work:
        engine.add(one)
    ends: dict[str, Finished | Scored | Failed] = {}
    for _ in range(2000):
        if not engine.has_work:
            return ends
        for event in engine.step():
            if isinstance(event, Finished | Scored | Failed):
                assert event.request_id not in ends, "one terminal event"
                ends[event.request_id] = event
    raise AssertionError("still at work")


def logprobs(end: Finished | Scored | Failed) -> tuple[float, ...]:
    if isinstance(end, Scored):
        return end.logprobs[0]
    assert isinstance(end, Finished), end
    return end.label_logprobs


def assert_alike(got: tuple[float, ...], exact: tuple[float, ...]) -> None:
    """Equal, but for labels of which it is enough to know that they are negligible."""
    negligible = max(exact) + math.log(NEGLIGIBLE)
    for one, other in zip(got, exact, strict=True):
        assert one == pytest.approx(other, abs=1e-4) or max(one, other) <= negligible + 1e-6


@pytest.mark.parametrize("label", LABELS)
def test_a_sure_label_has_its_probabilities_without_another_step(label: str) -> None:
    plain, told = FakeLlama(script=label), FakeLlama(script=label)
    bare = run(Engine(plain), Request("chat", (BOS, *b"a mail:"), SamplingParams(16, temperature=0)))["chat"]
    end = run(Engine(told), chat("chat"))["chat"]
    assert isinstance(bare, Finished)
    assert isinstance(end, Finished)
    assert (end.reason, end.usage) == (bare.reason, bare.usage)
    assert len(told.batches) == len(plain.batches), "no decode more"
    best = max(logprobs(end))
    assert logprobs(end).index(best) == LABELS.index(label)
    assert_alike(logprobs(end), logprobs(run(Engine(FakeLlama(script=label)), scoring())["scoring"]))


@settings(max_examples=60)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=8, unique=True).map(tuple))
def test_an_unsure_label_gets_what_a_scoring_request_gets(labels: tuple[str, ...]) -> None:
    """The fake draws logits from a hash, so that no label is negligible; a choice makes it write one of them."""
    llama = FakeLlama()
    engine = Engine(llama, EngineOptions(), GRAMMARS)
    choice = Grammar("choice", json.dumps(labels), "choice")
    end = run(engine, chat("chat", labels, grammar=choice))["chat"]
    assert isinstance(end, Finished)
    assert_alike(end.label_logprobs, logprobs(run(Engine(FakeLlama()), scoring(labels))["scoring"]))
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.rest()
    assert llama.used_cells == 0


def test_a_text_that_is_no_label_has_none() -> None:
    end = run(Engine(FakeLlama(script="hello")), chat("chat"))["chat"]
    assert isinstance(end, Finished)
    assert end.label_logprobs == ()


def test_a_cancelled_answer_leaves_nothing_while_its_labels_are_scored() -> None:
    """The text is complete, and the terminal event still waits for the other labels."""
    llama = FakeLlama()
    engine = Engine(llama)
    labels = ("aa", "ab", "ba", "bb")
    engine.add(chat("chat", labels, logit_bias={ord("a"): 60.0, ord("b"): 60.0}, max_tokens=2))
    text = ""
    while text not in labels:
        text += "".join(event.text for event in engine.step() if isinstance(event, TextDelta))
    assert engine.has_work
    (event,) = engine.cancel("chat")
    assert isinstance(event, Failed)
    assert not engine.has_work
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    engine.rest()
    assert llama.used_cells == 0


def test_labels_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(InvalidRequest):
        Engine(FakeLlama()).add(chat("chat", ("a", "")))


def test_company_does_not_change_a_labels_probabilities() -> None:
    alone = run(Engine(FakeLlama(script="fork")), chat("chat"))["chat"]
    together = run(Engine(FakeLlama(script="fork")), chat("chat"), chat("other"), scoring())
    assert logprobs(together["chat"]) == logprobs(together["other"]) == logprobs(alone)
