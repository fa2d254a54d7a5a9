"""Accuracy of a model on labelled examples: every example is sent once over HTTP, every answer kept.

An answer is the greedy text or the likeliest label (`label_scoring`); both repeat, up to floating-point ties. An
evaluation resumes: answers are saved as they arrive, and a second run sends only the missing examples if the model, the
prompt, the examples and the method are the same.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.errors import ServerFailed
from benchmarks.load.client import OpenAiClient, closed_loop
from benchmarks.load.label_scoring import LabelScorer
from benchmarks.load.workload import LabelledExample, answer_limit, labels_of, read_examples
from benchmarks.record import MachineRecord, load_record, save_json, this_machine
from models.common.console import NamedProgress
from models.common.files import sha256_file
from models.common.record import Record

from .arms import ArmPlan
from .asked import AskedSplit
from .scoring import ClassificationScore, Predictions, WritingScore, score, score_writing
from .task_scores import TaskScore, score_task

GROUP = 32
LOGPROB_DIGITS = 4
AnswerMethod = Literal["greedy text", "labels scored"]


class Prediction(Record):
    """One example's right label and the model's answer, stripped.

    `cut`: the answer reached its limit of tokens. `label_logprobs`: natural log-probabilities in the order
    of the evaluation's `labels`, where labels were scored.
    """

    id: str
    label: str
    prediction: str
    cut: bool = False
    label_logprobs: tuple[float, ...] = ()


class EvaluationSource(Record):
    """The identity of an evaluation: answers of another source are not mixed in.

    `asked_sha256` is that of a task's examples as they are asked, shots and schema included.
    """

    model: str
    model_sha256: str | None
    quantization: str | None
    prompt: str
    prompt_sha256: str
    endpoint: str
    examples: str
    examples_sha256: str
    scoring: AnswerMethod = "greedy text"
    max_tokens: int | None = None
    task: str = ""
    split: str = ""
    asked_sha256: str = ""


class Evaluation(Record):
    """A set of predictions and their source. Files made elsewhere need `labels` and `predictions` only.

    `labels` is empty where the examples' answers do not repeat: texts were written.
    """

    labels: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    source: EvaluationSource | None = None
    machine: MachineRecord | None = None
    note: str = ""


def load_evaluation(path: Path) -> Evaluation:
    """Read a predictions file. Raises BadRecord naming the file and the first wrong field."""
    return load_record(path, Evaluation, "holds no predictions")


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write a predictions file, whole or not at all; fields with their default value are left out."""
    save_json(path, evaluation.model_dump(mode="json", exclude_defaults=True))


def predictions_of(evaluation: Evaluation) -> Predictions:
    """`{id: (label, prediction)}`."""
    return {item.id: (item.label, item.prediction) for item in evaluation.predictions}


def score_evaluation(evaluation: Evaluation) -> ClassificationScore:
    """Accuracy, per-class figures and the confusion matrix of a set of predictions."""
    return score(predictions_of(evaluation), evaluation.labels)


def score_of(evaluation: Evaluation, asked: AskedSplit | None = None) -> TaskScore | WritingScore:
    """The score of a task's kind; of other examples that of labels, if the answers are some, else of texts."""
    if asked is not None:
        return score_task(predictions_of(evaluation), asked.task.spec)
    return score_evaluation(evaluation) if evaluation.labels else score_writing(predictions_of(evaluation))


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """An evaluation to run: the arm, the examples, requests at a time, and the file for the answers.

    `max_tokens` None: as long as the longest of the examples needs. `classifies`: answers are known to be labels.
    `asked` are the examples of a task, those of the file `examples`, as they are asked.
    """

    arm: ArmPlan
    examples: Path
    concurrency: int
    out: Path | None
    scoring: AnswerMethod = "greedy text"
    max_tokens: int | None = None
    classifies: bool = False
    asked: AskedSplit | None = None

    def read(self) -> tuple[tuple[LabelledExample, ...], tuple[str, ...]]:
        """The examples, and the labels to choose from. Raises BadWorkload."""
        if self.asked is not None:
            return self.asked.examples, self.asked.labels
        examples = read_examples(self.examples)
        return examples, labels_of(examples, classifies=self.classifies or self.scoring == "labels scored")


def evaluate(task: EvaluationTask, progress: NamedProgress) -> Evaluation:
    """Send the examples that have no answer yet. Raises ServerFailed when a request fails: gaps count as errors."""
    examples, labels = task.read()
    if task.scoring == "greedy text":
        task = replace(task, arm=task.arm.limited(task.max_tokens or answer_limit(examples)))
    source = _source(task)
    known = _resume(task.out, source)
    missing = [example for example in examples if example.id not in known]
    what = f"{source.model} ({source.prompt}, {source.scoring})"

    def build() -> Evaluation:
        made = tuple(known[example.id] for example in examples if example.id in known)
        return Evaluation(labels=labels, predictions=made, source=source, machine=this_machine())

    if missing:
        with task.arm.start() as server:
            for start in range(0, len(missing), GROUP):
                group = missing[start : start + GROUP]
                for made in asyncio.run(_answer(task, server.base_url, group, labels)):
                    known[made.id] = made
                if task.out is not None:
                    save_evaluation(task.out, build())
                progress(what, start + len(group), len(missing))
    return build()


def _source(task: EvaluationTask) -> EvaluationSource:
    facts, prompt, asked = task.arm.facts, task.arm.prompt, task.asked
    return EvaluationSource(
        model=facts.model,
        model_sha256=facts.sha256,
        quantization=facts.quantization,
        prompt=prompt.name,
        prompt_sha256=hashlib.sha256((prompt.system + prompt.render("{mail}")).encode()).hexdigest(),
        endpoint=facts.endpoint,
        examples=task.examples.name,
        examples_sha256=sha256_file(task.examples),
        scoring=task.scoring,
        max_tokens=facts.max_tokens,
        task=asked.task.name if asked is not None else "",
        split=asked.split if asked is not None else "",
        asked_sha256=asked.sha256 if asked is not None else "",
    )


def _resume(out: Path | None, source: EvaluationSource) -> dict[str, Prediction]:
    if out is None or not out.exists():
        return {}
    earlier = load_evaluation(out)
    if earlier.source != source:
        return {}
    return {item.id: item for item in earlier.predictions}


async def _answer(
    task: EvaluationTask, base_url: str, examples: Sequence[LabelledExample], labels: Sequence[str]
) -> Sequence[Prediction]:
    if task.scoring == "labels scored":
        return await _score(task, base_url, examples, labels)
    return await _write(task, base_url, examples)


async def _write(task: EvaluationTask, base_url: str, examples: Sequence[LabelledExample]) -> Sequence[Prediction]:
    """Let the model write its answer to each example."""
    plan = task.arm
    client = OpenAiClient(plan.target(base_url), time.perf_counter)
    send = client.chat if plan.chat else client.complete

    async def ask(example: LabelledExample, scheduled: float) -> Prediction:
        prompt, fields = plan.request(example)
        sample = await send(example, prompt, scheduled, **fields)
        if sample.error:
            raise ServerFailed(f"{plan.facts.model!r} could not answer {example.id!r}: {sample.error}")
        limit = plan.facts.max_tokens
        cut = limit is not None and (sample.completion_tokens or 0) >= limit
        return Prediction(id=example.id, label=example.label, prediction=sample.text.strip(), cut=cut)

    try:
        return await _loop(task, examples, ask)
    finally:
        await client.close()


async def _score(
    task: EvaluationTask, base_url: str, examples: Sequence[LabelledExample], labels: Sequence[str]
) -> Sequence[Prediction]:
    """Take the likeliest label of each example."""
    plan = task.arm
    scorer = LabelScorer(plan.target(base_url), labels)

    async def ask(example: LabelledExample, scheduled: float) -> Prediction:
        try:
            logprobs = await scorer.score(plan.request(example)[0])
        except ServerFailed as error:
            raise ServerFailed(f"{plan.facts.model!r} could not answer {example.id!r}: {error}") from error
        return Prediction(
            id=example.id,
            label=example.label,
            prediction=max(logprobs, key=logprobs.__getitem__),
            label_logprobs=tuple(round(value, LOGPROB_DIGITS) for value in logprobs.values()),
        )

    try:
        return await _loop(task, examples, ask)
    finally:
        await scorer.close()


async def _loop(
    task: EvaluationTask,
    examples: Sequence[LabelledExample],
    ask: Callable[[LabelledExample, float], Awaitable[Prediction]],
) -> Sequence[Prediction]:
    try:
        return await closed_loop(examples, task.concurrency, ask, time.perf_counter)
    except* ServerFailed as failures:
        raise failures.exceptions[0] from None
