"""A split of a task as a model is asked it: the task's prompt around each text, and shots before it.

Shots are examples of the train split with their answers, for a base model that was not trained on the task.

A model with a chat template gets the examples as earlier turns of the chat. A base model without one continues a text:
each example with its answer, then the text in question.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.errors import BadWorkload
from benchmarks.load.workload import LabelledExample, PromptTemplate, Said, labelled
from models.common.chat_records import ChatRecord
from models.task.task import INPUT_MARK, Task, rendered, text_of

SEED = 0
TEXT_MARK = "Text:\n"
# The end of a text to continue, as the runtime's own for a model without a chat template.
ANSWER_MARK = "\nAnswer:"
# Between examples, and the text that ends an answer: answers of several lines need another than an empty line.
BETWEEN, LINE_STOP = "\n\n", "\n"
BETWEEN_LONG, LONG_STOP = "\n\n---\n\n", "\n---"


@dataclass(frozen=True, slots=True)
class AskedSplit:
    """The examples of a split, the prompt around their texts, and the fields of every request.

    `n_shots` examples of the train split are in the prompt, or in what was said before each text.
    """

    task: Task
    split: str
    n_shots: int
    examples: tuple[LabelledExample, ...]
    prompt: PromptTemplate
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The task's labels; none where texts or JSON are written."""
        return self.task.spec.labels

    @property
    def sha256(self) -> str:
        """The identity of what is asked: the examples with all that is said before them, and the requests' fields."""
        asked = [[one.id, one.before, one.text, one.label] for one in self.examples]
        return hashlib.sha256(json.dumps([asked, self.fields], sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The task, the split and the number of shots, for people."""
        shots = f", {self.n_shots} shots" if self.n_shots else ""
        return f"{self.task.name}, {self.split} split{shots}"


def bare_texts(task: Task, split: str, prompt: PromptTemplate) -> AskedSplit:
    """The split with a `prompt` of the user's own around its bare texts."""
    return AskedSplit(task, split, 0, _examples(task.records(split), task.file(split)), prompt, _text_fields(task, ()))


def as_chat(task: Task, split: str, n_shots: int) -> AskedSplit:
    """The split for a model with a chat template: the shots are turns before the text. Raises BadWorkload, BadTask."""
    examples = _examples(rendered(task, split), task.file(split))
    if n_shots:
        train = {record.id: record for record in rendered(task, "train")}
        shots = [train[one.id] for one in choose_shots(task, split, n_shots)]
        examples = tuple(after_turns(task, one, shots) for one in examples)
    schema = task.spec.json_schema
    fields = {} if schema is None else {"response_format": _response_format(schema)}
    return AskedSplit(task, split, n_shots, examples, PromptTemplate(_prompt_name(n_shots)), fields)


def after_turns(task: Task, example: LabelledExample, shots: Sequence[ChatRecord]) -> LabelledExample:
    """The example after turns that show `shots`, which have the task's prompt around their texts already."""
    turns = tuple(said for one in shots for said in (*_spoken(one), ("assistant", one.answer)))
    before = (*_system(_head(task)), *turns, *_without_system(example.before))
    return LabelledExample(example.id, example.text, example.label, before)


def as_text(task: Task, split: str, n_shots: int) -> AskedSplit:
    """The split for a base model to continue. Raises BadWorkload and BadTask."""
    shots = choose_shots(task, split, n_shots) if n_shots else ()
    records = task.records(split)
    return AskedSplit(
        task,
        split,
        n_shots,
        _examples(records, task.file(split)),
        continued_prompt(task, shots),
        _text_fields(task, (*records, *shots)),
    )


def continued_prompt(task: Task, shots: Sequence[ChatRecord]) -> PromptTemplate:
    """The text to continue, around the text in question: what is asked, and the `shots` with their answers."""
    before, after = task.spec.prompt.split(INPUT_MARK)
    if shots and task.spec.prompt == INPUT_MARK:
        before = TEXT_MARK
    if not after.endswith(":"):
        after += ANSWER_MARK
    between = BETWEEN_LONG if _is_long(shots) else BETWEEN
    shown = "".join(f"{before}{text_of(one)}{after} {one.answer}{between}" for one in shots)
    head = _head(task) if shots else task.spec.system
    return PromptTemplate(_prompt_name(len(shots)), f"{head}{BETWEEN if head else ''}{shown}{before}", after)


def choose_shots(task: Task, split: str, n: int) -> tuple[ChatRecord, ...]:
    """Choose `n` examples of the train split, the same in every run: short ones, and as many of each label.

    Raises BadWorkload if there are too few, or if it is the train split that is evaluated.
    """
    if split == "train":
        raise BadWorkload(f"--shots {n} shows examples of the train split: evaluate another, --split test")
    records = task.records("train")
    if n > len(records):
        raise BadWorkload(f"--shots {n} needs as many examples, the train split of {task.name!r} has {len(records)}")
    chance = random.Random(SEED)
    middle = median(len(text_of(one)) for one in records)
    order = sorted(chance.sample(records, len(records)), key=lambda one: len(text_of(one)) > middle)
    if task.spec.labels:
        seen = Counter[str]()
        earlier = {}
        for one in order:
            earlier[one.id] = seen[one.answer]
            seen[one.answer] += 1
        order.sort(key=lambda one: earlier[one.id])
    return tuple(chance.sample(order[:n], n))


def _examples(records: Sequence[ChatRecord], path: Path) -> tuple[LabelledExample, ...]:
    return tuple(labelled(record, path) for record in records)


def _text_fields(task: Task, records: Sequence[ChatRecord]) -> dict[str, Any]:
    """The end of an answer, and its schema: OpenAI's /v1/completions has no field for one, this is vLLM's."""
    fields: dict[str, Any] = {"stop": LONG_STOP if _is_long(records) else LINE_STOP}
    if task.spec.json_schema is not None:
        fields["structured_outputs"] = {"json": task.spec.json_schema}
    return fields


def _is_long(records: Sequence[ChatRecord]) -> bool:
    return any("\n" in record.answer for record in records)


def _head(task: Task) -> str:
    """The instruction before the shots: a few of them need not show every label."""
    labels = task.spec.labels
    listed = f"Every text is answered with one of these labels: {', '.join(labels)}." if labels else ""
    return "\n\n".join(part for part in (task.spec.system, listed) if part)


def _system(head: str) -> Said:
    return (("system", head),) if head else ()


def _spoken(record: ChatRecord) -> Said:
    return _without_system(tuple((message.role, message.content) for message in record.prompt))


def _without_system(said: Said) -> Said:
    return tuple(one for one in said if one[0] not in {"system", "developer"})


def _response_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(schema)}}


def _prompt_name(n_shots: int) -> str:
    return f"task's prompt, {n_shots} shots" if n_shots else "task's prompt"


def require_objects(examples: Sequence[LabelledExample], task: Task) -> None:
    """Raise BadWorkload if the answer to an example of an extraction is no JSON object."""
    for one in examples:
        try:
            value = json.loads(one.label)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise BadWorkload(
                f"task {task.name!r}: the answer to example {one.id!r} is no JSON object: {one.label!r:.80}; "
                f"`deskside task check {task.address}` lists all such answers"
            )
