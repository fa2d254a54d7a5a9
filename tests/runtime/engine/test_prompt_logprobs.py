"""The log-probabilities of a prompt's own tokens: those of a plain computation, whatever else the engine does."""

import numpy as np
import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.requests import Event, Finished, Request, SamplingParams, TextDelta, TokenLogprob
from tests.support.runtime.fakes import FakeLlama


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    return events


def told(events: list[Event], name: str) -> list[TokenLogprob]:
    deltas = [event for event in events if isinstance(event, TextDelta) and event.request_id == name]
    return [logprob for delta in deltas for logprob in delta.logprobs]


def expected(llama: FakeLlama, tokens: tuple[int, ...]) -> list[float]:
    rows = [llama.logits(tokens[:end]).astype(np.float64) for end in range(1, len(tokens))]
    return [
        float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum()))
        for row, token in zip(rows, tokens[1:], strict=True)
    ]


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 3, *, scored: bool = True) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=2, ignore_eos=True, prompt_logprobs=scored)
    return Request(name, prompt, params)


LONG = tuple(np.random.default_rng(3).integers(97, 122, 90).tolist())


@pytest.mark.parametrize("prompt", [LONG, LONG[:2], LONG[:1]], ids=["in pieces", "two tokens", "one token"])
def test_every_token_but_the_first_has_its_log_probability(prompt: tuple[int, ...]) -> None:
    llama = FakeLlama(n_seq_max=8)
    engine = Engine(llama, EngineOptions(max_running=4))
    for name in ("before", "again"):  # the second time all of it is in the cache
        engine.add(request(name, prompt))
        events = run(engine)
        answer = told(events, name)
        assert [logprob.token for logprob in answer[: len(prompt) - 1]] == list(prompt[1:])
        assert len(answer) == len(prompt) - 1 + 3
        scored = [logprob.logprob for logprob in answer[: len(prompt) - 1]]
        assert scored == pytest.approx(expected(llama, prompt), abs=1e-4)
        assert all(len(logprob.top) == 2 for logprob in answer)
        (last,) = [event for event in events if isinstance(event, Finished)]
        assert (last.usage.cached_tokens, last.usage.completion_tokens) == (0, 3)


def test_the_answer_is_the_one_without_them() -> None:
    answers = []
    for scored in (False, True):
        engine = Engine(FakeLlama(), EngineOptions())
        engine.add(request("r", LONG, 9, scored=scored))
        answers.append("".join(event.text for event in run(engine) if isinstance(event, TextDelta)))
    assert answers[0] == answers[1] != ""


def test_a_prompt_that_is_computed_again_is_told_once() -> None:
    """Without room the later request is pre-empted, and begins anew."""
    llama = FakeLlama(n_ctx=200, n_seq_max=8)
    engine = Engine(llama, EngineOptions(max_running=4, step_tokens=16))
    prompts = {"a": LONG, "b": LONG[::-1]}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, 40))
    events = run(engine)
    assert engine.stats().preemptions_total > 0
    for name, prompt in prompts.items():
        answer = told(events, name)
        assert [logprob.token for logprob in answer[: len(prompt) - 1]] == list(prompt[1:])
        assert len(answer) == len(prompt) - 1 + 40
