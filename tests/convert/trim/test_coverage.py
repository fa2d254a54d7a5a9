"""Coverage is counted in tokens of the full vocabulary; answers are compared as texts."""

import pytest

from convert.errors import RequestInvalid
from convert.trim.plan import coverage, greedy_agreement, plan_trim
from tests.support.convert.vocabularies import sentencepiece
from tests.support.runtime.fakes import FakeLlama


def test_tokens_and_whole_examples_are_covered_by_shares() -> None:
    full = sentencepiece({"aa": 0.0, "bb": -1.0, "cc": -2.0, "dd": -3.0})
    plan = plan_trim(full, ["aabb"], 261)
    found = coverage(full, plan, ["aabb", "aacc", "ddcc", "bb"])
    assert (found.tokens, found.examples) == (4 / 7, 2 / 4)
    report = found.report(plan, 0.5)
    assert (report.tokens_before, report.tokens_after) == (263, 261)
    assert (report.covered_tokens, report.covered_examples, report.greedy_agreement) == (4 / 7, 0.5, 0.5)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_held_out_text_is_refused(texts: list[str]) -> None:
    full = sentencepiece({"aa": 0.0, "bb": -1.0})
    with pytest.raises(RequestInvalid, match="no text"):
        coverage(full, plan_trim(full, ["aa"], 260), texts)


def answering(by_prompt: dict[str, str]) -> FakeLlama:
    """A model that gives each prompt its answer, whatever begins it."""
    llama = FakeLlama(n_ctx=256, n_batch=4)

    def next_token(history: tuple[int, ...]) -> int:
        text = llama.tokenizer.decode(history)
        prompt = next(prompt for prompt in by_prompt if text.startswith(prompt))
        said = text[len(prompt) :]
        return llama.tokenizer.encode(by_prompt[prompt][len(said) :] or "<eos>", add_special=False, parse_special=True)[
            0
        ]

    llama.script = next_token
    return llama


def test_agreement_is_the_share_of_prompts_with_the_same_text_for_an_answer() -> None:
    whole = answering({"a mail ": "spam", "b mail ": "ham", "c mail ": "ham", "d mail ": "x" * 200})
    cut = answering({"a mail ": "spam", "b mail ": "hamlet", "c mail ": "spam", "d mail ": "x" * 100})
    steps: list[tuple[int, int]] = []
    prompts = ["a mail ", "b mail ", "c mail ", "d mail "]
    assert greedy_agreement(whole, cut, prompts, lambda *step: steps.append(step)) == 2 / 4
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert greedy_agreement(whole, whole, prompts, lambda *_: None) == 1
    with pytest.raises(RequestInvalid, match="no held-out prompts"):
        greedy_agreement(whole, cut, [], lambda *_: None)
    with pytest.raises(RequestInvalid, match=r"a prompt of \d+ tokens leaves no room .* in a context of 256"):
        greedy_agreement(whole, cut, ["a mail " + "x" * 200], lambda *_: None)
