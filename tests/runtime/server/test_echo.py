"""`echo` of `/v1/completions`: the prompt before its answers, with the log-probabilities that harnesses need."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.runtime.fakes import BOS, FakeLlama
from tests.support.runtime.serving import Running, serving

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def toy() -> Iterator[Running]:
    with serving(FakeLlama(n_ctx=1024, script="hello")) as running:
        yield running


def asked(toy: Running, **fields: Any) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = toy.http.post(PATH, json=fields).raise_for_status().json()["choices"]
    return choices


def streamed(toy: Running, n_choices: int, **fields: Any) -> list[str]:
    texts = [""] * n_choices
    for chunk in toy.client().completions.create(model="toy", stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


@pytest.mark.parametrize("logprobs", [None, 1])
def test_each_answer_begins_with_its_prompt_whole_and_streamed(toy: Running, logprobs: int | None) -> None:
    fields: Any = {"prompt": ["ab", "é"], "n": 2, "echo": True, "logprobs": logprobs, "max_tokens": 3}
    whole = [choice["text"] for choice in asked(toy, **fields)]
    assert whole == ["abhel", "abhel", "éhel", "éhel"]
    assert streamed(toy, 4, **fields) == whole


def test_the_prompts_tokens_have_log_probabilities_and_the_first_has_none(toy: Running) -> None:
    prompt = [BOS, *b"ab"]
    (choice,) = asked(toy, prompt=prompt, echo=True, logprobs=1, max_tokens=2)
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert choice["text"].endswith("abhe")
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 5
    assert all(choice["text"].startswith(t, at) for t, at in zip(found["tokens"], found["text_offset"], strict=True))
    rows = [toy.llama.logits(tuple(prompt[:end])) for end in (1, 2)]
    assert [next(iter(top)) for top in found["top_logprobs"][1:3]] == [chr(int(row.argmax())) for row in rows]


def test_a_harness_gets_the_prompt_alone(toy: Running) -> None:
    """Loglikelihood requests: no token is to be written."""
    answer = toy.client().completions.create(model="toy", prompt="ab", echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == "ab"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert (choice.logprobs.tokens or [])[-2:] == ["a", "b"]
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, answer.usage.prompt_tokens)
    assert streamed(toy, 1, prompt="ab", echo=True, logprobs=1, max_tokens=0) == ["ab"]
    (bare,) = asked(toy, prompt="ab", echo=True, max_tokens=0)
    assert (bare["text"], bare["logprobs"]) == ("ab", None)
    full = [65] * 1023
    assert asked(toy, prompt=full, echo=True, max_tokens=0)[0]["text"] == "A" * 1023
