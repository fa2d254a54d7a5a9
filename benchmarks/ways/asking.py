"""Ask a model each question of a way over HTTP, once, and keep each answer as it arrives."""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.comparison.arms import ArmPlan
from benchmarks.errors import ServerFailed
from benchmarks.load.client import OpenAiClient, closed_loop
from benchmarks.load.workload import LabelledExample
from benchmarks.record import RequestSample

from .hosted import SpendingCap
from .record import Part, WayAnswer

WayEndpoint = Literal["chat", "completions", "decisions"]
MAX_TRIES = 6
MOST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class WayQuestion:
    """An example as it is asked: the text of the prompt, and the fields of the request."""

    example: LabelledExample
    prompt: str
    fields: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """The identity of the question, 16 hex digits."""
        return hashlib.sha256(json.dumps([self.prompt, self.fields], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def n_bytes(self) -> int:
        """The bytes of all that is sent: no token of a text is shorter than one."""
        return len(self.prompt.encode()) + len(json.dumps(self.fields, ensure_ascii=False).encode())


@dataclass(frozen=True, slots=True)
class AskedWay:
    """A way that asks a model: its server (`plan`) and the questions of each split.

    `first_line`: the answer is the first line with text, as a base model without examples to copy begins with a break.
    """

    name: str
    how: str
    plan: ArmPlan
    endpoint: WayEndpoint
    questions: Mapping[Part, tuple[WayQuestion, ...]]
    labels: tuple[str, ...] = ()
    first_line: bool = False

    @property
    def identity(self) -> str:
        """The hash of the model (its file's, else its API's address), the endpoint and the fields of the user's own."""
        facts = self.plan.facts
        parts = [facts.model, facts.sha256 or facts.source, self.endpoint, dict(self.plan.body)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def limit(self) -> int:
        """The most tokens of an answer."""
        plan = self.plan
        return int(plan.body.get(plan.limit_field) or plan.facts.max_tokens or 1)


@dataclass(frozen=True, slots=True)
class AskingRules:
    """The requests at a time, the most to spend, and the function that waits before another try."""

    concurrency: int
    cap: SpendingCap | None = None
    wait: Callable[[float], Awaitable[None]] = asyncio.sleep


def ask(
    way: AskedWay,
    base_url: str,
    questions: Sequence[WayQuestion],
    rules: AskingRules,
    keep: Callable[[WayAnswer], None],
) -> None:
    """Send each question once and call `keep` with its answer. Raises ServerFailed.

    With a cap the questions that would exceed it are not sent.
    """
    asyncio.run(_ask(way, base_url, questions, rules, keep))


async def _ask(
    way: AskedWay,
    base_url: str,
    questions: Sequence[WayQuestion],
    rules: AskingRules,
    keep: Callable[[WayAnswer], None],
) -> None:
    client = OpenAiClient(way.plan.target(base_url), time.perf_counter)

    async def send(question: WayQuestion, scheduled: float) -> None:
        answer = await _answer(way, client, question, rules, scheduled)
        if answer is not None:
            keep(answer)

    try:
        await closed_loop(questions, rules.concurrency, send, time.perf_counter)
    except* ServerFailed as failures:
        raise failures.exceptions[0] from None
    finally:
        await client.close()


async def _answer(
    way: AskedWay, client: OpenAiClient, question: WayQuestion, rules: AskingRules, scheduled: float
) -> WayAnswer | None:
    """The answer, after as many tries as the server asks for; None if there is no money for it."""
    send = {"chat": client.chat, "completions": client.complete, "decisions": client.decide}[way.endpoint]
    for tries in range(1, MAX_TRIES + 1):
        reserved = rules.cap.reserve(question.n_bytes, way.limit) if rules.cap is not None else 0.0
        if reserved is None:
            return None
        sent_at = time.time()
        sample = await send(question.example, question.prompt, scheduled, **question.fields)
        if rules.cap is not None:
            rules.cap.settle(reserved, question.n_bytes, sample)
        if sample.error is None:
            return _kept(way, question, sample, sent_at, tries)
        if sample.retry_after_s is None or tries == MAX_TRIES:
            break
        await rules.wait(min(MOST_WAIT_S, max(sample.retry_after_s, 2.0 ** (tries - 1))))
    raise ServerFailed(
        f"{way.name}: {way.plan.facts.model!r} could not answer {question.example.id!r}: {sample.error}. "
        "The answers so far are kept: the same command continues; --ways leaves a way out"
    )


def _kept(way: AskedWay, question: WayQuestion, sample: RequestSample, sent_at: float, tries: int) -> WayAnswer:
    text = sample.text.strip()
    if way.first_line:
        text = next((line.strip() for line in text.splitlines() if line.strip()), "")
    known = all(label in sample.probabilities for label in way.labels)
    return WayAnswer(
        id=sample.id,
        label=sample.label,
        answer=text,
        asked=question.sha256,
        probabilities=tuple(sample.probabilities[label] for label in way.labels) if known else (),
        cut=way.endpoint != "decisions" and (sample.completion_tokens or 0) >= way.limit,
        tries=tries,
        sent_at=round(sent_at, 3),
        first_text_s=round(sample.deltas_s[0] - sample.sent_s, 6) if sample.deltas_s else None,
        took_s=round(sample.finished_s - sample.sent_s, 6),
        prompt_tokens=sample.prompt_tokens,
        cached_tokens=sample.cached_tokens,
        completion_tokens=sample.completion_tokens,
    )
