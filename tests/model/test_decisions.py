"""Decisions on the real classifier: what it picks is what it would have written, alone or in company."""

import asyncio
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import load
from runtime.requests import Scored, Scoring, ScoringPrompt
from runtime.serving.chat import prepare_chat
from runtime.serving.model import ServedModel, load_model
from runtime.serving.reading import prepare_decision

pytestmark = pytest.mark.model

TEST_SPLIT = Path(__file__).parents[2] / "models" / "email_triage" / "data" / "test.jsonl.gz"
N_MAILS = 8
# The same tokens in a batch of another shape move a logit by up to 0.95: choices this close are a tie.
NEAR_TIE = 1.0


@pytest.fixture(scope="module")
def mails() -> list[str]:
    with gzip.open(TEST_SPLIT, "rt", encoding="utf-8") as lines:
        return [json.loads(next(lines))["messages"][0]["content"] for _ in range(N_MAILS)]


@pytest.fixture(scope="module")
def served(email_triage: StoredModel) -> Iterator[ServedModel]:
    model = load_model(email_triage, RuntimeConfig(slots=4, context=2048, threads=1))
    yield model
    model.supervisor.stop()


def body(served: ServedModel, mail: str) -> dict[str, Any]:
    assert served.manifest is not None
    choices = [{"value": label} for label in served.manifest.labels]
    return {"input": mail, "questions": [{"type": "choice", "instructions": "Which list?", "choices": choices}]}


def decide(served: ServedModel, mails: list[str]) -> list[dict[str, Any]]:
    """The answer for each mail, all asked at once."""

    async def one(mail: str) -> dict[str, Any]:
        call = prepare_decision(body(served, mail), served)
        response = await call.fold(served.supervisor.submit(*call.work))
        answers: Any = response["answers"]
        (answer,) = answers
        assert sum(item["probability"] for item in answer["probabilities"]) == pytest.approx(1)
        return dict(answer)

    async def every() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*map(one, mails)))

    return asyncio.run(every())


def written(served: ServedModel, mail: str) -> str:
    async def one() -> Any:
        fields = {"messages": [{"role": "user", "content": mail}], "temperature": 0, "max_tokens": 16}
        call = prepare_chat(fields, served)
        return await call.fold(served.supervisor.submit(*call.work))

    return str(asyncio.run(one())["choices"][0]["message"]["content"])


def probability(answer: dict[str, Any], label: str) -> float:
    return float(next(item["probability"] for item in answer["probabilities"] if item["value"] == label))


def is_tie(answer: dict[str, Any], other: str) -> bool:
    return math.log(answer["confidence"] / probability(answer, other)) < NEAR_TIE


def test_the_choice_is_what_the_model_would_have_written(served: ServedModel, mails: list[str]) -> None:
    for mail, answer in zip(mails, decide(served, mails), strict=True):
        label = written(served, mail)
        assert label == answer["choice"] or is_tie(answer, label)


def test_company_does_not_change_the_choice(served: ServedModel, mails: list[str]) -> None:
    together = decide(served, mails)
    for mail, answer in zip(mails, together, strict=True):
        (alone,) = decide(served, [mail])
        assert alone["choice"] == answer["choice"] or is_tie(answer, alone["choice"])


def test_sums_are_those_of_each_label_computed_by_itself(
    served: ServedModel, email_triage: StoredModel, mails: list[str]
) -> None:
    call = prepare_decision(body(served, mails[0]), served)
    (scoring,) = call.work
    assert isinstance(scoring, Scoring)
    (question,) = scoring.questions

    async def scored() -> Scored:
        async for event in served.supervisor.submit(scoring):
            assert isinstance(event, Scored), event
            return event
        raise AssertionError

    (sums,) = asyncio.run(scored()).logprobs
    llama = load(email_triage.gguf, LoadOptions(n_ctx=512, n_batch=512, n_seq_max=16, n_threads=1))
    try:
        exact = [alone(llama, question, choice) for choice in question.choices]
    finally:
        llama.close()
    best = max(exact)
    for got, true in zip(sums, exact, strict=True):
        negligible = max(got, true) < best + math.log(1e-3)
        assert negligible or got == pytest.approx(true, abs=NEAR_TIE)


def alone(llama: Any, question: ScoringPrompt, choice: tuple[int, ...]) -> float:
    """The log-probability of one choice, in one decode of its own; of its end too where another goes on from it."""
    llama.clear()
    tokens = np.asarray(question.prompt + choice, np.int32)
    wanted = (np.arange(len(tokens)) >= len(question.prompt) - 1).astype(np.int8)
    rows = llama.decode(Batch(tokens, np.arange(len(tokens), dtype=np.int32), np.zeros_like(tokens), wanted))
    rows = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    said = sum(rows[place, token] for place, token in enumerate(choice))
    if any(other[: len(choice)] == choice for other in question.choices if other != choice):
        said += np.log(np.exp(rows[-1, list(question.ends)]).sum())
    return float(said)
