"""The same request, the same answer, bit for bit, on the real model, in any state of the cache."""

import asyncio
import gzip
import json
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load
from runtime.requests import Event, Request, SamplingParams, TextDelta
from runtime.serving.call import Call
from runtime.serving.chat import prepare_chat
from runtime.serving.model import ServedModel, load_model
from runtime.serving.reading import prepare_decision, prepare_embedding

pytestmark = pytest.mark.model

TEST_SPLIT = Path(__file__).parents[2] / "models" / "email_triage" / "data" / "test.jsonl.gz"
N_PROMPTS = 12
ROUNDS = 4
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "seeded": {"temperature": 1.0, "seed": 7}}

Ask = Callable[[str], Coroutine[Any, Any, object]]


@pytest.fixture(scope="module")
def mails() -> list[str]:
    with gzip.open(TEST_SPLIT, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["messages"][0]["content"] for _ in range(N_PROMPTS)]


@pytest.fixture(scope="module")
def served(email_triage: StoredModel) -> Iterator[ServedModel]:
    model = load_model(email_triage, RuntimeConfig(slots=4, context=2048, threads=1))
    yield model
    model.supervisor.stop()


async def fold(call: Call, served: ServedModel) -> Any:
    return await call.fold(served.supervisor.submit(*call.work))


async def written(served: ServedModel, sampling: dict[str, Any], mail: str) -> object:
    """The answer with every log-probability."""
    messages = [{"role": "user", "content": mail}]
    body = {"messages": messages, "max_tokens": 12, "logprobs": True, "top_logprobs": 3, "ignore_eos": True, **sampling}
    choice = (await fold(prepare_chat(body, served), served))["choices"][0]
    return choice["message"]["content"], choice["logprobs"], choice["finish_reason"]


async def decided(served: ServedModel, mail: str) -> object:
    assert served.manifest is not None
    choices = [{"value": label} for label in served.manifest.labels]
    questions = [{"type": "choice", "instructions": "Which list?", "choices": choices}]
    return (await fold(prepare_decision({"input": mail, "questions": questions}, served), served))["answers"]


async def embedded(served: ServedModel, mail: str) -> object:
    return (await fold(prepare_embedding({"input": [mail, mail[:50]]}, served), served))["data"]


async def in_turn(ask: Ask, mails: list[str]) -> list[object]:
    return [await ask(mail) for mail in mails]


async def at_once(ask: Ask, mails: list[str]) -> list[object]:
    return list(await asyncio.gather(*map(ask, mails)))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_asked_four_times_and_beside_others_each_prompt_gets_one_answer(
    served: ServedModel, mails: list[str], sampling: str
) -> None:
    ask = partial(written, served, SAMPLINGS[sampling])
    first = asyncio.run(in_turn(ask, mails))
    found = served.supervisor.stats().cached_tokens_total
    for mail, answer in zip(mails, first, strict=True):  # the first of them is computed anew, the others are found
        assert asyncio.run(in_turn(ask, [mail] * (ROUNDS - 1))) == [answer] * (ROUNDS - 1)
    assert served.supervisor.stats().cached_tokens_total > found, "nothing was found in the cache"
    assert asyncio.run(at_once(ask, mails)) == first


@pytest.mark.parametrize("ask", [decided, embedded])
def test_decisions_and_embeddings_repeat_alone_and_beside_others(
    served: ServedModel, mails: list[str], ask: Callable[[ServedModel, str], Coroutine[Any, Any, object]]
) -> None:
    asked, some = partial(ask, served), mails[:4]
    first = asyncio.run(in_turn(asked, some))
    assert asyncio.run(in_turn(asked, some[::-1])) == first[::-1]
    assert asyncio.run(at_once(asked, some)) == first


@pytest.mark.parametrize("name", ["email-triage", "gemma-3-270m"])
def test_prompts_beyond_the_window_repeat_after_any_other(
    name: str, email_triage: StoredModel, base_gguf: Path, mails: list[str]
) -> None:
    """The base's file is Q4_K_M, whose products of one row and of many round apart."""
    options = EngineOptions(max_running=4, snapshot_bytes=1 << 28)
    load_options = LoadOptions(n_ctx=4096, n_batch=256, n_seq_max=4, n_outputs=8, n_threads=1, streams=True)
    llama = load(email_triage.gguf if name == "email-triage" else base_gguf, load_options)
    engine = Engine(llama, options)
    params = SamplingParams(8, temperature=0.7, seed=7, logprobs=3, ignore_eos=True)
    prompts = ["\n\n".join([*mails[:6], mail]) for mail in mails[:3]]
    asked = [
        Request(str(i), tuple(llama.tokenizer.encode(prompt, add_special=True, parse_special=False)), params)
        for i, prompt in enumerate(prompts)
    ]
    assert all(512 < len(request.prompt) < 4000 for request in asked)
    try:
        alone = [answers(engine, request) for request in asked]
        llama.clear()
        again = Engine(llama, options)
        assert [answers(again, request) for request in asked[::-1]] == alone[::-1]
        assert answers(again, *asked) == {name: answer for one in alone for name, answer in one.items()}
        assert again.stats().cached_tokens_total > 0
    finally:
        engine.close()


def answers(engine: Engine, *requests: Request) -> dict[str, list[object]]:
    """Each request's log-probabilities, asked at once."""
    for request in requests:
        engine.add(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    found: dict[str, list[object]] = {request.id: [] for request in requests}
    for event in events:
        if isinstance(event, TextDelta):
            found[event.request_id] += event.logprobs
    return found
