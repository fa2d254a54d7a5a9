"""The examples as the model will be asked: with the task's prompt around their texts, cut to a length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint.source import open_checkpoint
from convert.errors import RequestInvalid
from convert.training.examples import cut_examples, tokenizer_for
from convert.training.settings import AUTO_TOKENS, FinetuneSettings
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.manifest import Prompt
from models.task.task import TASK_FILE, Task, tasks_home, text_of, write_text_length
from runtime.llama.interface import TokenizerLike
from runtime.prompt.cut import cut_text

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
    (train, n_train), (validation, n_validation) = (
        cut_examples(records, prompt, tokenizer) for records in bare.values()
    )
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


def check_choosable(task: Task, settings: FinetuneSettings) -> None:
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


def keep_length(task: Task, length: int | None, report: Reporter) -> None:
    """Write the length into the task if it is one of Deskside's folder; else say how."""
    path = str(task.folder / TASK_FILE)
    if task.folder.resolve().parent == tasks_home().resolve():
        write_text_length(task, length)
        report.note(f"{path!r}: " + ("max_text_tokens taken out" if length is None else f"max_text_tokens = {length}"))
    else:
        line = "take max_text_tokens out of" if length is None else f"write max_text_tokens = {length} into"
        report.note(f"to keep the length for the task, {line} {path!r}")
