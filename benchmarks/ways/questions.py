"""The questions of each way that asks a model: the prompt around a text, which endpoint, and the form of the answer.

A fine-tune that classifies is asked for a decision, which gives every label's probability. Other models write: a local
base is held to the labels or to the schema, a hosted API gets fields of OpenAI's own only.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.comparison.arms import KEY_VARIABLE, ArmPlan, base_arm, fine_tune_arm, hosted_arm
from benchmarks.comparison.asked import (
    LINE_STOP,
    AskedSplit,
    after_turns,
    as_chat,
    as_text,
    continued_prompt,
)
from benchmarks.load.workload import LabelledExample, answer_limit
from models.common.chat_records import ChatRecord
from models.gguf.header import read_meta
from models.store.store import StoredModel
from models.task.task import Task, rendered, text_of

from .asking import AskedWay, WayEndpoint, WayQuestion
from .counted import Voters
from .record import Part

TEMPLATE_FIELD = "tokenizer.chat_template"
# Bytes of retrieved examples in one prompt, about 4,000 tokens: long texts would not fit the context.
MAX_SHOWN_BYTES = 16_000
QUESTION = "Which label?"
Drawn = Mapping[Part, Sequence[ChatRecord]]
"""The examples that are asked of each split."""


def fine_tune_way(task: Task, stored: StoredModel, drawn: Drawn, url: str | None) -> AskedWay:
    """The model as it was trained: the text in the task's prompt, no example before it."""
    labels = stored.manifest.labels if stored.manifest is not None else ()
    asked = {part: as_chat(task, part, 0) for part in drawn}
    some = next(iter(asked.values()))
    plan = fine_tune_arm(stored, some.prompt, url)
    if labels and task.spec.labels:
        choices = [{"value": label} for label in task.spec.labels]
        question = {"type": "choice", "instructions": QUESTION, "choices": choices}
        plan = replace(plan, fields={"questions": [question]})
        questions = {part: _chosen(drawn[part], _decisions(plan, asked[part].examples)) for part in drawn}
        plan = _at(plan, "/v1/decisions")
        return AskedWay("fine-tune", "asked as trained", plan, "decisions", questions, task.spec.labels)
    plan = _limited(replace(plan, fields={**plan.fields, **some.fields}), task, asked)
    return AskedWay("fine-tune", "asked as trained, greedy text", plan, "chat", _plain(plan, asked, drawn))


def base_way(name: str, task: Task, stored: StoredModel, drawn: Drawn, n_shots: int, url: str | None) -> AskedWay:
    """The base model with the task's prompt, and `n_shots` examples before each text."""
    chats = bool(read_meta(stored.gguf).text(TEMPLATE_FIELD))
    asked = {part: (as_chat if chats else as_text)(task, part, n_shots) for part in drawn}
    plan, endpoint = _base_plan(task, stored, chats, asked, url)
    first_line = not n_shots and endpoint == "completions" and task.spec.kind == "write"
    if first_line and plan.fields.get("stop") == LINE_STOP:
        plan = replace(plan, fields={key: value for key, value in plan.fields.items() if key != "stop"})
    shown = f"{n_shots} examples in the prompt, the same for every text" if n_shots else "no example in the prompt"
    how = f"{shown}{_held(task)}"
    return AskedWay(name, how, plan, endpoint, _plain(plan, asked, drawn), first_line=first_line)


def retrieved_way(
    task: Task, stored: StoredModel, drawn: Drawn, n_shots: int, voters: Voters, url: str | None
) -> AskedWay:
    """The base model with the `n_shots` train examples most like each text before it, the most similar last.

    What is the same in every prompt comes first, so that its prefix is computed once.
    """
    chats = bool(read_meta(stored.gguf).text(TEMPLATE_FIELD))
    asked = {part: (as_chat if chats else as_text)(task, part, 0) for part in drawn}
    plan, endpoint = _base_plan(task, stored, chats, asked, url)
    if "stop" in plan.fields:
        # That of a prompt with examples.
        stop = as_text(task, "test", 1).fields["stop"]
        plan = replace(plan, fields={**plan.fields, "stop": stop})
    told = {one.id: one for one in rendered(task, "train")}
    questions: dict[Part, tuple[WayQuestion, ...]] = {}
    for part, records in drawn.items():
        texts = {one.id: text_of(one) for one in records}
        made = []
        for example in asked[part].examples:
            if example.id not in texts:
                continue
            shots = _fitting(voters.nearest(texts[example.id], n_shots))[::-1]
            if chats:
                turns = after_turns(task, example, [told[one.id] for one in shots])
                made.append(_question(plan, turns))
            else:
                made.append(_question(replace(plan, prompt=continued_prompt(task, shots)), example))
        questions[part] = tuple(made)
    how = f"the {n_shots} train examples most like the text (BM25) in its prompt, the most similar last{_held(task)}"
    return AskedWay("retrieved", how, plan, endpoint, questions)


def hosted_way(task: Task, url: str, model: str, body: Mapping[str, Any], drawn: Drawn, n_shots: int) -> AskedWay:
    """A model of any OpenAI-compatible API with a few-shot prompt, the examples as turns of a chat."""
    asked = {part: as_chat(task, part, n_shots) for part in drawn}
    some = next(iter(asked.values()))
    plan = hosted_arm(url, model, some.prompt, os.environ.get(KEY_VARIABLE), body)
    plan = _limited(replace(plan, fields={**plan.fields, **some.fields}), task, asked)
    how = f"{n_shots} examples as turns before the text"
    return AskedWay("hosted", how, plan, "chat", _plain(plan, asked, drawn))


def _base_plan(
    task: Task, stored: StoredModel, chats: bool, asked: Mapping[Part, AskedSplit], url: str | None
) -> tuple[ArmPlan, WayEndpoint]:
    some = next(iter(asked.values()))
    plan = (fine_tune_arm if chats else base_arm)(stored, some.prompt, url)
    fields = {**plan.fields, **some.fields}
    if task.spec.labels:
        # With the space and the end of the line that a base model writes: without the end a label would lose to a
        # longer one that begins with it.
        held = [label if chats else f" {label}\n" for label in task.spec.labels]
        fields["structured_outputs"] = {"choice": held}
    plan = _limited(replace(plan, fields=fields), task, asked)
    return plan, "chat" if chats else "completions"


def _held(task: Task) -> str:
    return {"classify": ", held to the labels", "extract": ", held to the schema"}.get(task.spec.kind, "")


def _limited(plan: ArmPlan, task: Task, asked: Mapping[Part, AskedSplit]) -> ArmPlan:
    limit = max(answer_limit(one.examples) for one in asked.values())
    # JSON that is cut is not valid: twice the longest is enough for other spacing and longer values.
    return plan.limited(2 * limit if task.spec.json_schema is not None else limit)


def _plain(plan: ArmPlan, asked: Mapping[Part, AskedSplit], drawn: Drawn) -> dict[Part, tuple[WayQuestion, ...]]:
    return {
        part: _chosen(drawn[part], [_question(plan, one) for one in split.examples]) for part, split in asked.items()
    }


def _question(plan: ArmPlan, example: LabelledExample) -> WayQuestion:
    prompt, fields = plan.request(example)
    return WayQuestion(example, prompt, fields)


def _decisions(plan: ArmPlan, examples: Sequence[LabelledExample]) -> list[WayQuestion]:
    """The server puts the model's prompt around the last message where it is not there yet."""
    made = []
    for one in examples:
        said = [{"role": role, "content": text} for role, text in (*one.before, ("user", one.text))]
        fields = {**plan.fields, **({"input": said} if one.before else {})}
        made.append(WayQuestion(one, one.text, fields))
    return made


def _chosen(records: Sequence[ChatRecord], questions: Sequence[WayQuestion]) -> tuple[WayQuestion, ...]:
    by_id = {one.example.id: one for one in questions}
    return tuple(by_id[record.id] for record in records)


def _fitting(shots: Sequence[ChatRecord]) -> list[ChatRecord]:
    """The first of `shots` that fit a prompt together; one at least."""
    kept: list[ChatRecord] = []
    n_bytes = 0
    for one in shots:
        n_bytes += len(text_of(one).encode()) + len(one.answer.encode())
        if kept and n_bytes > MAX_SHOWN_BYTES:
            break
        kept.append(one)
    return kept


def _at(plan: ArmPlan, endpoint: str) -> ArmPlan:
    return plan.with_facts(plan.facts.model_copy(update={"endpoint": endpoint}))
