"""`deskside bench`: the plan of a run, checked whole before a server starts, and the run itself."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.errors import BadWorkload, ServerFailed
from benchmarks.load.client import OpenAiClient, closed_loop
from benchmarks.load.servers import recipe_file
from benchmarks.load.workload import (
    DrawnExamples,
    LabelledExample,
    PromptTemplate,
    answer_limit,
    draw,
    labels_of,
    read_examples,
    read_prompt,
    template_prompt,
)
from benchmarks.record import (
    Arm,
    BenchRun,
    Level,
    RequestSample,
    Workload,
    now_text,
    results_file,
    save_run,
    this_machine,
)
from models.common.console import NamedProgress
from models.common.files import sha256_file
from models.common.machine import load_average
from models.common.record import Record
from models.manifest import BARE_PROMPT
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store, StoredModel

from .arms import BASE, FINE_TUNE, HOSTED, KEY_VARIABLE, ArmPlan, base_arm, fine_tune_arm, hosted_arm, replayed_arm

WARMUP = 2
QUICK = {"requests": 6, "concurrency": "1,4"}
Keep = Callable[[Arm], None]


class BenchSettings(Record):
    """The options of `deskside bench`. `quick` changes the defaults that make a run long."""

    model: str = Field(default=DEFAULT_MODEL, description="The fine-tune: a model of the store, or a path.")
    base: str = Field(default="gemma-3-270m", description="The base model that gets the few-shot prompt.")
    examples: Path | None = Field(
        default=None, description="Labelled chat records, .jsonl or .jsonl.gz (default: email-triage's test split)."
    )
    few_shot: Path | None = Field(
        default=None, description="Prompt file with {text} once (default: email-triage's, for its test split)."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of an answer (default: enough for the longest of the examples)."
    )
    requests: int = Field(default=64, ge=1, description="Requests per arm and level; a p90 needs 64.")
    concurrency: str = Field(default="1,4,16", description="Levels of the closed loop, users at a time.")
    arms: str = Field(default=f"{FINE_TUNE},{BASE},{HOSTED}", description="Arms to run.")
    url: str | None = Field(
        default=None, description="A running server (…/v1) of the fine-tune; without it, one is started."
    )
    base_url: str | None = Field(default=None, description="A running server (…/v1) of the base model.")
    hosted_url: str | None = Field(default=None, description="A hosted API (…/v1) to measure instead of the replay.")
    hosted_model: str | None = Field(
        default=None, description=f"Model of the hosted API; its key is read from ${KEY_VARIABLE}."
    )
    hosted_body: str = Field(default="{}", description="JSON merged over each hosted request; a null removes a field.")
    quick: bool = Field(
        default=False, description="A few requests only: a check that everything works, not a measurement."
    )
    seed: int = Field(default=0, description="Seed of the examples of each level and of the replayed latencies.")
    out: Path | None = Field(default=None, description="JSON file (default: results/bench-<time>.json).")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run: the arms in order, the examples of each concurrency, and the file for the record."""

    arms: Sequence[ArmPlan]
    workload: Workload
    drawn: DrawnExamples
    out: Path


def make_plan(settings: BenchSettings, store: Store) -> RunPlan:
    """Read the examples and prompts, look the models up, and draw the examples of each level.

    Raises BadWorkload, ModelNotFound and BadManifest.
    """
    if settings.quick:
        given = settings.model_fields_set
        settings = settings.model_copy(update={name: value for name, value in QUICK.items() if name not in given})
    path = settings.examples or recipe_file("data", "test.jsonl.gz")
    examples = read_examples(path)
    levels = _integers(settings.concurrency)
    drawn = draw(examples, levels, settings.requests, WARMUP, settings.seed)
    names = [name.strip() for name in settings.arms.split(",")]
    tuned = store.resolve(settings.model).manifest if FINE_TUNE in names else None
    workload = Workload(
        examples=path.name,
        sha256=sha256_file(path),
        available=len(examples),
        requests_per_level=settings.requests,
        concurrency=tuple(levels),
        seed=settings.seed,
        labels=labels_of(examples, classifies=tuned is not None and tuned.task == "classify"),
    )
    arms = []
    for name in names:
        arm = _arm(name, settings, examples, store)
        share = arm.prompt.shared_share(examples)
        arm = arm.limited(settings.max_tokens or answer_limit(examples))
        arms.append(arm.with_facts(arm.facts.model_copy(update={"shared_share": share})))
    return RunPlan(arms, workload, drawn, settings.out or results_file("bench"))


def run(plan: RunPlan, progress: NamedProgress) -> BenchRun:
    """Run every arm; the record returned is also on disk. `progress(what, done, total)` is called after each answer.

    Raises ServerFailed when a server does not start or fails its warm-up; earlier measurements are on disk.
    """
    record = BenchRun(started_at=now_text(), machine=this_machine(), workload=plan.workload)
    for arm_plan in plan.arms:
        progress(f"{arm_plan.facts.name}: starting {arm_plan.facts.model}", 0, 1)
        earlier = record.arms

        def keep(arm: Arm, earlier: tuple[Arm, ...] = earlier) -> None:
            nonlocal record
            record = record.model_copy(update={"arms": (*earlier, arm)})
            save_run(plan.out, record)

        with arm_plan.start() as server:
            arm = arm_plan.facts.model_copy(update={"start_s": server.start_s or None})
            asyncio.run(_Measurement(arm_plan, server.base_url, keep, progress).run(arm, plan.drawn))
    record = record.model_copy(update={"finished_at": now_text()})
    save_run(plan.out, record)
    return record


class _Measurement:
    """The measurement of one arm against its running server. Each level restarts the clock."""

    def __init__(self, plan: ArmPlan, base_url: str, keep: Keep, progress: NamedProgress) -> None:
        self._plan = plan
        self._keep = keep
        self._progress = progress
        self._origin = time.perf_counter()
        self._client = OpenAiClient(plan.target(base_url), self._clock)

    def _clock(self) -> float:
        return time.perf_counter() - self._origin

    async def run(self, arm: Arm, drawn: DrawnExamples) -> None:
        try:
            warmup = await closed_loop(drawn.warmup, 1, self._ask, self._clock)
            if warmup and all(sample.error for sample in warmup):
                raise ServerFailed(f"{arm.name}: {arm.model!r} failed its warm-up: {warmup[0].error}")
            arm = arm.model_copy(update={"warmup": warmup})
            for concurrency, examples in drawn.levels.items():
                level = await self._level(arm.name, concurrency, examples)
                arm = arm.model_copy(update={"levels": (*arm.levels, level)})
                self._keep(arm)
        finally:
            await self._client.close()

    async def _level(self, name: str, concurrency: int, examples: Sequence[LabelledExample]) -> Level:
        done = 0

        async def ask(example: LabelledExample, scheduled: float) -> RequestSample:
            nonlocal done
            sample = await self._ask(example, scheduled)
            done += 1
            self._progress(f"{name} ×{concurrency}", done, len(examples))
            return sample

        load_before = load_average()
        self._origin = time.perf_counter()
        samples = await closed_loop(examples, concurrency, ask, self._clock)
        return Level(concurrency=concurrency, load_before=load_before, samples=samples)

    async def _ask(self, example: LabelledExample, scheduled: float) -> RequestSample:
        send = self._client.chat if self._plan.chat else self._client.complete
        prompt, fields = self._plan.request(example)
        return await send(example, prompt, scheduled, **fields)


def require_labels(stored: StoredModel, examples: Sequence[LabelledExample]) -> None:
    """Raise BadWorkload if the model's labels are known and an example's answer is none of them."""
    labels = stored.manifest.labels if stored.manifest is not None else ()
    if labels and (other := next((one for one in examples if one.label not in labels), None)) is not None:
        raise BadWorkload(
            f"example {other.id!r} is answered {other.label!r:.80}, which is none of the {len(labels)} labels of "
            f"{stored.name!r}: give a --task or --examples that it was trained for"
        )


def _few_shot(settings: BenchSettings) -> PromptTemplate:
    if settings.few_shot is None and settings.examples is not None:
        raise BadWorkload(
            f"--few-shot FILE is missing: the prompt, with {{text}} once, that the base and the hosted API get for "
            f"{settings.examples.name}; --arms {FINE_TUNE} measures the fine-tune alone"
        )
    return read_prompt(settings.few_shot or recipe_file("prompts", "few_shot.txt"), "few-shot prompt")


def _arm(name: str, settings: BenchSettings, examples: Sequence[LabelledExample], store: Store) -> ArmPlan:
    if name == FINE_TUNE:
        stored = store.resolve(settings.model)
        require_labels(stored, examples)
        prompt = stored.manifest.prompt if stored.manifest else BARE_PROMPT
        return fine_tune_arm(stored, template_prompt("short prompt", prompt), settings.url)
    if name == BASE:
        return base_arm(store.resolve(settings.base), _few_shot(settings), settings.base_url)
    if name != HOSTED:
        raise BadWorkload(f"no arm is called {name!r}; use {FINE_TUNE!r}, {BASE!r} or {HOSTED!r}")
    if settings.hosted_url is None:
        return replayed_arm(_few_shot(settings), settings.seed)
    if settings.hosted_model is None:
        raise BadWorkload("--hosted-url needs --hosted-model")
    key = os.environ.get(KEY_VARIABLE)
    body = hosted_body(settings.hosted_body)
    return hosted_arm(settings.hosted_url, settings.hosted_model, _few_shot(settings), key, body)


def hosted_body(text: str) -> dict[str, Any]:
    """The fields that are merged over each request of a hosted API. Raises BadWorkload."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise BadWorkload(f"--hosted-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadWorkload(f"--hosted-body must be a JSON object, got {text!r}")
    return body


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadWorkload(f"--concurrency must be whole numbers separated by commas, got {text!r}") from error
