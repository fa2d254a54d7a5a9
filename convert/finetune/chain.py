"""From a task, or a file of examples, to an installed model: checked, trained, converted and chosen."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint.source import open_checkpoint
from convert.errors import FinetuneFailed, RequestInvalid
from convert.measure.examples import MIN_EXAMPLES
from convert.pipeline import convert
from convert.planning.inputs import licensed
from convert.planning.origin import Origin, find_origin
from convert.planning.request import ConvertRequest
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.common.files import default_home, write_atomic
from models.manifest import MANIFEST_FILE, Prompt, dump_manifest
from models.store.store import Store, StoredModel, check_name
from models.task.check.check import check_task
from models.task.new import NewTask, make_task
from models.task.task import TASK_FILE, Task, open_task, tasks_home, text_of, write_text_length
from runtime.llama.interface import TokenizerLike
from runtime.prompt.cut import cut_text

from .examples import rendered, tokenizer_for
from .settings import AUTO_TOKENS, FinetuneRequest, FinetuneResult, FinetuneSettings
from .train import check_installed, finetune

FOLDER = "trained"
"""Folder of the store that results go to, unless the user names another."""


# Beside the text, the template and the answer need some tokens of an example.
REST_TOKENS = 512
MAX_TOKENS = 4096


@dataclass(frozen=True)
class AskedExamples:
    """The examples as the model is asked: both splits with `prompt` around their texts, cut as it says.

    `n_cut` of them were cut. `settings` are those of the training, with the length that was chosen.
    """

    train: list[ChatRecord]
    validation: list[ChatRecord]
    prompt: Prompt
    settings: FinetuneSettings
    n_cut: int = 0


@dataclass(frozen=True)
class Finetuned:
    """A finished fine-tune of a task. `stored` is None if it was only trained, and `conversion` makes the model."""

    task: Task
    asked: AskedExamples
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
    _check_choosable(task, settings)
    _check(task, report)
    origin = find_origin(request.base, None, store, report)
    out = request.out if request.out is not None else default_home() / FOLDER / name
    asked = examples_to_ask(task, settings, origin.path, report)
    result = finetune(origin.path, asked.train, asked.validation, task.spec.labels, asked.settings, out, report)
    if settings.tokens is not None and asked.prompt != task.spec.manifest_prompt():
        _keep_length(task, asked.prompt.max_text_tokens, report)
    conversion = _conversion(request, task, name, asked.prompt, result, origin)
    stored = None if request.only_train else convert(conversion, store, report)
    return Finetuned(task, asked, result, conversion, stored)


def examples_to_ask(task: Task, settings: FinetuneSettings, base: Path, report: Reporter) -> AskedExamples:
    """The examples to train and validate on, cut to the length that is given, chosen, or the task's own.

    An example to train on that becomes the same as one to validate on is left out. Raises what reading the base does.
    """
    prompt, tokenizer = task.spec.manifest_prompt(), None
    bare = {split: task.records(split) for split in ("train", "validation")}
    if settings.tokens is not None or prompt.max_text_tokens is not None:
        checkpoint = open_checkpoint(base)
        try:
            tokenizer = tokenizer_for(checkpoint, bare["train"])
        finally:
            checkpoint.close()
    if tokenizer is not None and settings.tokens is not None:
        chosen = settings.tokens
        length = _choose_length(bare, tokenizer, report) if chosen == AUTO_TOKENS else chosen
        prompt = prompt.model_copy(update={"max_text_tokens": length})
    length = prompt.max_text_tokens
    (train, n_train), (validation, n_validation) = (rendered(records, prompt, tokenizer) for records in bare.values())
    changes: dict[str, object] = {"tokens": length}
    if length is not None and "max_tokens" not in settings.model_fields_set:
        changes["max_tokens"] = min(MAX_TOKENS, max(settings.max_tokens, length + REST_TOKENS))
    n_cut = n_train + n_validation
    if length is not None:
        report.note(f"{n_cut} of {len(train) + len(validation)} texts are cut to their first {length} tokens")
        held = {record.prompt for record in validation}
        kept = [record for record in train if record.prompt not in held]
        if n_same := len(train) - len(kept):
            report.note(f"{n_same} examples to train on are left out: cut, they are the same as one to validate on")
            train = kept
    return AskedExamples(train, validation, prompt, settings.model_copy(update=changes), n_cut)


def _check_choosable(task: Task, settings: FinetuneSettings) -> None:
    """Raise RequestInvalid if a length is to be chosen for work that has no labels to choose it by."""
    if settings.tokens == AUTO_TOKENS and task.spec.kind != "classify":
        raise RequestInvalid(
            "--tokens auto compares the labels that a word model gives to texts of different lengths, and the task "
            f"{task.name!r} is of kind {task.spec.kind!r}, without labels: give a number, such as --tokens 256"
        )


def _choose_length(bare: Mapping[str, Sequence[ChatRecord]], tokenizer: TokenizerLike, report: Reporter) -> int | None:
    """The length that a word model needs, by its accuracy on validation; None: whole texts."""
    from models.task.words.lengths import LabelledTexts, length_ladder, shortest

    report.stage("choose a length of texts")
    train, validation = (
        LabelledTexts([text_of(record) for record in records], [record.answer for record in records])
        for records in bare.values()
    )
    ladder = length_ladder(
        train,
        validation,
        lambda text, length: cut_text(text, length, tokenizer),
        lambda text: len(tokenizer.encode(text, add_special=False, parse_special=False)),
        report.advance,
    )
    for point in ladder:
        report.note(point.told)
    chosen = shortest(ladder)
    what = (
        "whole texts" if chosen is None else f"{chosen} tokens, the shortest that loses at most a point to whole texts"
    )
    report.note(f"chosen: {what}")
    return chosen


def _keep_length(task: Task, length: int | None, report: Reporter) -> None:
    """Write the length into the task if it is one of Deskside's folder; else say how."""
    path = str(task.folder / TASK_FILE)
    if task.folder.resolve().parent == tasks_home().resolve():
        write_text_length(task, length)
        report.note(f"{path!r}: " + ("max_text_tokens taken out" if length is None else f"max_text_tokens = {length}"))
    else:
        line = "take max_text_tokens out of" if length is None else f"write max_text_tokens = {length} into"
        report.note(f"to keep the length for the task, {line} {path!r}")


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
    request: FinetuneRequest, task: Task, name: str, prompt: Prompt, result: FinetuneResult, origin: Origin
) -> ConvertRequest:
    """The conversion of what was trained: chosen on the validation examples, if they are enough to choose by."""
    spec, out = task.spec, result.trained if result.trained.is_dir() else result.trained.parent
    manifest = licensed(origin).model_copy(
        update={
            "name": name,
            "description": f"Fine-tuned on the task {task.name}: {spec.source or 'own examples'}.",
            "task": "classify" if spec.kind == "classify" else "write",
            "labels": spec.labels,
            "prompt": prompt,
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
