"""`deskside eval`: its options, and the evaluation that they ask for, checked before a server starts."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from benchmarks.errors import BadWorkload
from benchmarks.load.servers import recipe_file
from benchmarks.load.workload import answer_limit, read_examples, read_prompt, template_prompt
from models.common.options import Flag
from models.common.record import Record
from models.errors import ModelNotFound
from models.gguf.header import read_meta
from models.manifest import BARE_PROMPT
from models.store.store import Store, StoredModel
from models.task.task import Task, open_task

from .arms import KEY_VARIABLE, ArmPlan, base_arm, fine_tune_arm, hosted_arm
from .asked import AskedSplit, as_chat, as_text, bare_texts, require_objects
from .evaluate import EvaluationTask
from .run import require_labels

TEMPLATE_FIELD = "tokenizer.chat_template"


class EvalSettings(Record):
    """The options of `deskside eval`. Without `task` and `examples` it is email-triage's test split."""

    task: Annotated[str | None, Flag(metavar="TASK", shown="email-triage's")] = Field(
        default=None, description="A task's name or folder: its prompt, its examples, its scorer."
    )
    split: Annotated[Literal["test", "validation", "train"] | None, Flag(shown="test")] = Field(
        default=None, description="Split of the task."
    )
    shots: int = Field(
        default=0, ge=0, le=64, description="Show N examples of the task's train split before each text."
    )
    score_labels: bool = Field(
        default=False,
        description="Take the label that a base model finds likeliest, not the text it writes (`deskside serve` only).",
    )
    examples: Path | None = Field(default=None, description="Labelled chat records instead of a task.")
    prompt: Path | None = Field(default=None, description="Prompt file with {text} once, for a base model to continue.")
    url: str | None = Field(
        default=None,
        description=f"A running server (…/v1); without it, one is started. Its key is read from ${KEY_VARIABLE}.",
    )
    concurrency: int = Field(default=8, ge=1, description="Requests at a time.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens of an answer (default: enough for the longest of the examples)."
    )
    out: Path | None = Field(
        default=None, description="Keep each answer in this JSON file; a second run resumes from it."
    )


def evaluation_task(model: str, settings: EvalSettings, store: Store) -> EvaluationTask:
    """Resolve the model and the files. Raises ModelNotFound, BadManifest, BadTask, BadWorkload."""
    _check(settings)
    if settings.examples is not None:
        return _of_examples(store.resolve(model), settings.examples, settings)
    task = open_task(settings.task or str(recipe_file()))
    arm, asked = _of_task(model, task, settings, store)
    max_tokens = settings.max_tokens
    if task.spec.json_schema is not None:
        require_objects(asked.examples, task)
        # JSON that is cut is not valid: twice the longest is enough for other spacing and longer values.
        max_tokens = max_tokens or 2 * answer_limit(asked.examples)
    if settings.score_labels and (arm.chat or task.spec.kind != "classify"):
        why = "has a chat template" if arm.chat else f"is asked a task of kind {task.spec.kind!r}"
        raise BadWorkload(
            f"--score-labels is for a base model that continues a text; {model!r} {why}: leave the option out"
        )
    return EvaluationTask(
        arm,
        task.file(asked.split),
        settings.concurrency,
        settings.out,
        scoring="labels scored" if settings.score_labels else "greedy text",
        max_tokens=max_tokens,
        asked=asked,
    )


def _check(settings: EvalSettings) -> None:
    """Refuse options that contradict each other."""
    given = {
        "--task": settings.task is not None,
        "--split": settings.split is not None,
        "--shots": settings.shots > 0,
        "--score-labels": settings.score_labels,
    }
    for option, is_given in given.items():
        if is_given and settings.examples is not None:
            raise BadWorkload(f"{option} is of a task, and --examples is a file of any: leave one of them out")
    if settings.shots and settings.prompt is not None:
        raise BadWorkload("--prompt holds the examples that the model is to see: leave out --shots, or --prompt")


def _of_examples(stored: StoredModel, examples: Path, settings: EvalSettings) -> EvaluationTask:
    if settings.prompt is None:
        require_labels(stored, read_examples(examples))
        prompt = stored.manifest.prompt if stored.manifest else BARE_PROMPT
        arm = fine_tune_arm(stored, template_prompt("short prompt", prompt), settings.url)
    else:
        arm = base_arm(stored, read_prompt(settings.prompt), settings.url)
    return EvaluationTask(
        arm,
        examples,
        settings.concurrency,
        settings.out,
        max_tokens=settings.max_tokens,
        classifies=stored.manifest is not None and stored.manifest.task == "classify",
    )


def _of_task(model: str, task: Task, settings: EvalSettings, store: Store) -> tuple[ArmPlan, AskedSplit]:
    """The way the model is asked: a text to continue where it has no chat template, else a chat."""
    split = settings.split or "test"
    stored = _stored(model, settings, store)
    if settings.prompt is not None:
        asked = bare_texts(task, split, read_prompt(settings.prompt))
        arm = base_arm(store.resolve(model), asked.prompt, settings.url)
    elif stored is None:
        assert settings.url is not None, "else the model is resolved"
        asked = as_chat(task, split, settings.shots)
        arm = hosted_arm(settings.url, model, asked.prompt, os.environ.get(KEY_VARIABLE), {})
    else:
        chats = bool(read_meta(stored.gguf).text(TEMPLATE_FIELD))
        asked = (as_chat if chats else as_text)(task, split, settings.shots)
        if not settings.shots:
            require_labels(stored, asked.examples)
        arm = (fine_tune_arm if chats else base_arm)(stored, asked.prompt, settings.url)
    return replace(arm, fields={**arm.fields, **asked.fields}), asked


def _stored(model: str, settings: EvalSettings, store: Store) -> StoredModel | None:
    """The model on this disk; None for one that only the server at `--url` knows. Raises ModelNotFound."""
    try:
        return store.resolve(model)
    except ModelNotFound:
        if settings.url is None:
            raise
        return None
