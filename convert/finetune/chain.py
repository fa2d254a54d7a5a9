"""From a task, or a file of examples, to an installed model: checked, trained, converted and chosen."""

import re
from dataclasses import dataclass
from pathlib import Path

from convert.errors import FinetuneFailed, RequestInvalid
from convert.measure.examples import MIN_EXAMPLES, json_is_compact
from convert.pipeline import convert
from convert.planning.inputs import licensed
from convert.planning.origin import Origin, find_origin
from convert.planning.request import ConvertRequest
from models.common.chat_records import ChatMessage, ChatRecord
from models.common.console import Reporter
from models.common.files import default_home, write_atomic
from models.manifest import MANIFEST_FILE, Prompt, dump_manifest
from models.store.store import Store, StoredModel, check_name
from models.task.check.check import check_task
from models.task.new import NewTask, make_task
from models.task.task import TASK_FILE, Task, open_task, tasks_home

from .settings import FinetuneRequest, FinetuneResult, FinetuneSettings
from .train import check_installed, finetune

FOLDER = "trained"
"""Folder of the store that results go to, unless the user names another."""


@dataclass(frozen=True)
class Finetuned:
    """A finished fine-tune of a task. `stored` is None if it was only trained, and `conversion` makes the model."""

    task: Task
    result: FinetuneResult
    conversion: ConvertRequest
    stored: StoredModel | None


def finetune_task(request: FinetuneRequest, settings: FinetuneSettings, store: Store, report: Reporter) -> Finetuned:
    """Check the task, train on it, and install the model that loses nothing of it.

    What can be refused is refused before the training. Raises RequestInvalid, FinetuneFailed, and what the task, the
    training and the conversion raise.
    """
    check_installed()
    task = _task(request, report)
    name = check_name(request.name or task.name)
    if name in store.names() and not (request.replace or request.only_train):
        raise RequestInvalid(f"{name!r} is installed already; give --replace, or another --name")
    _check(task, report)
    origin = find_origin(request.base, None, store, report)
    out = request.out if request.out is not None else default_home() / FOLDER / name
    train, validation = (rendered(task, split) for split in ("train", "validation"))
    result = finetune(origin.path, train, validation, task.spec.labels, settings, out, report)
    conversion = _conversion(request, task, name, result, origin)
    stored = None if request.only_train else convert(conversion, store, report)
    return Finetuned(task, result, conversion, stored)


def rendered(task: Task, split: str) -> list[ChatRecord]:
    """The examples of a split with the task's prompt around their texts, as they will be asked."""
    prompt = task.spec.manifest_prompt()
    return [
        ChatRecord(record.id, record.line, _messages(prompt, record), record.answer) for record in task.records(split)
    ]


def _messages(prompt: Prompt, record: ChatRecord) -> tuple[ChatMessage, ...]:
    said = prompt.messages((message.role, message.content) for message in record.prompt)
    return tuple(ChatMessage(str(one["role"]), str(one["content"])) for one in said)


def _task(request: FinetuneRequest, report: Reporter) -> Task:
    """The task, made of the file first if one is given. A file that a task was made of before is not read again."""
    file = Path(request.task).expanduser()
    if not file.is_file() or file.name == TASK_FILE:
        return open_task(request.task)
    name = request.name or re.sub(r"[^A-Za-z0-9._-]+", "-", file.name.partition(".")[0]).strip("-._") or "task"
    folder = tasks_home() / name
    if not folder.exists():
        made = make_task(NewTask(name=name, file=file))
        told = [f"{what}: {found}" for what, found, _ in made.found]
        told += [f"{n} {split}" for split, n in made.sizes.items()]
        report.note(f"task {name!r} made of {file.name}: {', '.join(told)}")
        return made.task
    task = open_task(name)
    if file.stat().st_mtime > (folder / TASK_FILE).stat().st_mtime:
        raise RequestInvalid(
            f"{str(file)!r} has changed since the task {name!r} was made of it: give another --name, or remove the "
            f"folder {str(folder)!r} to make it again"
        )
    report.note(f"the task {name!r} was made of {file.name} before: {str(folder)!r}")
    return task


def _check(task: Task, report: Reporter) -> None:
    """Look through the examples. Raises FinetuneFailed for what would make every figure untrue."""
    report.stage("check the examples")
    checked = check_task(task, advance=report.advance)
    for finding in checked.findings:
        if finding.severity == "mend":
            raise FinetuneFailed(f"{finding.kind}: {finding.n} {finding.what}. To mend it: {finding.mend}")
    if looks := [f"{finding.kind} ({finding.n})" for finding in checked.findings if finding.severity == "look"]:
        report.note(f"worth a look, `deskside task check {task.address}`: {', '.join(looks)}")
    if checked.advice:
        report.note(checked.advice)


def _conversion(
    request: FinetuneRequest, task: Task, name: str, result: FinetuneResult, origin: Origin
) -> ConvertRequest:
    """The conversion of what was trained: chosen on the validation examples, if they are enough to choose by."""
    spec, out = task.spec, result.trained if result.trained.is_dir() else result.trained.parent
    manifest = licensed(origin).model_copy(
        update={
            "name": name,
            "description": f"Fine-tuned on the task {task.name}: {spec.source or 'own examples'}.",
            "task": "classify" if spec.kind == "classify" else "write",
            "labels": spec.labels,
            "prompt": spec.manifest_prompt(),
            "compact_json": spec.kind == "extract" and json_is_compact(task.records("train")) is True,
        }
    )
    write_atomic(out / MANIFEST_FILE, dump_manifest(manifest))
    adapter = result.trained if result.trained.is_dir() else None
    enough = len({record.prompt for record in task.records("validation")}) >= MIN_EXAMPLES
    return ConvertRequest(
        source=request.base if adapter is not None else str(result.trained),
        adapter=adapter,
        examples=task.file("validation") if enough else None,
        name=name,
        manifest=out / MANIFEST_FILE,
        replace=request.replace,
    )
