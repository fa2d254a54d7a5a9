"""From a task, or a file of examples, to an installed model: checked, trained, converted and chosen."""

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from convert.checkpoint.source import open_checkpoint
from convert.errors import FinetuneFailed, RequestInvalid, TrimImpossible
from convert.measure.examples import MIN_EXAMPLES, json_is_compact
from convert.pipeline import convert
from convert.planning.inputs import licensed
from convert.planning.origin import Origin, find_origin
from convert.planning.request import ConvertRequest
from convert.quantize.quantize import HALF_PRECISION
from convert.replacement import incumbent_of
from convert.training.settings import FinetuneResult, FinetuneSettings
from convert.training.train import check_installed, finetune
from convert.trim.fields import KEPT_FIELD
from convert.trim.plan import DEFAULT_KEEP
from models.common.console import Reporter
from models.common.files import default_home, sha256_file, write_atomic
from models.common.machine import describe_machine
from models.gguf.fields import TOKENS
from models.manifest import MANIFEST_FILE, Manifest, dump_manifest
from models.store.store import Store, StoredModel, check_name
from models.task.check.check import check_task
from models.task.new import NewTask, make_task
from models.task.task import TASK_FILE, Task, open_task, tasks_home
from models.training import MAX_LOSSES, Epoch, Training

from .asked import AskedExamples, check_choosable, examples_to_ask, keep_length
from .depth import AUTO, BaseTools, DepthChoice, TrainedDepth
from .request import FinetuneRequest

FOLDER = "trained"
"""Folder of the store that results go to, unless the user names another."""
CUT_FOLDER = "base"
# A cut saves less of a smaller vocabulary than it costs in words that come in pieces.
SMALL_VOCABULARY = 3


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

    An installed model of the name answers the validation examples before the training, and is replaced only if the new
    one is not worse on them. What can be refused is refused before the training. Raises RequestInvalid, FinetuneFailed,
    NotReplaced, and what the task, the training and the conversion raise.
    """
    check_installed()
    task = _task(request, report)
    name = check_name(request.name or task.name)
    check_choosable(task, settings)
    if request.depth == AUTO and task.spec.kind != "classify":
        raise RequestInvalid(f"--depth auto compares labels, and {task.name!r} has none: give a number, or all")
    _check_promise(request, task)
    _check(task, report)
    origin = find_origin(request.base, None, store, report)
    tested = None if request.only_train else incumbent_of(name, task, store, report, overruled=request.replace)
    out = request.out if request.out is not None else default_home() / FOLDER / name
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / MANIFEST_FILE, dump_manifest(_manifest(task, name, origin)))
    base = origin.path if request.whole_vocabulary else _cut_vocabulary(task, origin, out, report)
    asked = examples_to_ask(task, settings, base, report)

    def train(base: Path, settings: FinetuneSettings, folder: str) -> FinetuneResult:
        def seeded(one: FinetuneSettings, name: str) -> FinetuneResult:
            place = out / folder / name
            return finetune(base, asked.train, asked.validation, task.spec.labels, one, place, report)

        return _best_of_seeds(request.seeds, settings, seeded, report)

    tools = BaseTools(task.spec.labels)
    trained = DepthChoice(base, asked, train, out / CUT_FOLDER, report, tools).trained(request.depth)
    result = trained.result
    if settings.tokens is not None and asked.prompt != task.spec.manifest_prompt():
        keep_length(task, asked.prompt.max_text_tokens, report)
    source = _source(trained.base, request, origin)
    known = {"prompt": asked.prompt, "training": _training(task, asked, trained)}
    manifest = _manifest(task, name, origin).model_copy(update=known)
    conversion = _conversion(request, task, manifest, result, source)
    admit = partial(tested.admit, conversion) if tested is not None else None
    stored = None if request.only_train else convert(conversion, store, report, admit)
    return Finetuned(task, asked, result, conversion, stored)


def _best_of_seeds(
    n_seeds: int,
    settings: FinetuneSettings,
    train: Callable[[FinetuneSettings, str], FinetuneResult],
    report: Reporter,
) -> FinetuneResult:
    """The best result of training with `n_seeds` seeds in turn, each in a folder of its own that resumes.

    Their spread is chance: two settings that differ by less than that are equal as far as one can see.
    """
    if n_seeds == 1:
        return train(settings, "")
    share = settings.minutes / n_seeds if settings.minutes is not None else None
    results = []
    for seed in range(settings.seed, settings.seed + n_seeds):
        results.append(train(settings.model_copy(update={"seed": seed, "minutes": share}), f"seed-{seed}"))
        best = results[-1].best
        told = f"accuracy {best.accuracy:.3f}" if best.accuracy is not None else f"loss {best.loss:.3f}"
        report.note(f"seed {seed}: {told} on the validation examples")
    best_result = results[0]
    for result in results[1:]:
        if result.best.is_better_than(best_result.best):
            best_result = result
    return best_result


def _training(task: Task, asked: AskedExamples, trained: TrainedDepth) -> Training:
    """The training as manifest and card tell it."""
    result, settings = trained.result, asked.settings
    return Training(
        task=task.name,
        machine=describe_machine(),
        method=settings.method,
        examples=len(asked.train),
        validation_examples=len(asked.validation),
        base_depth=trained.base_depth,
        depth=trained.depth,
        layers=result.cost.layers,
        learning_rate=settings.learning_rate,
        batch=settings.batch,
        seed=result.seed,
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
        best_epoch=result.best.epoch,
        epochs=tuple(Epoch(train_loss=one.train_loss, loss=one.loss, accuracy=one.accuracy) for one in result.epochs),
        losses=_spans(result.losses),
        probe=trained.probe,
        depths=trained.tried,
    )


def _spans(losses: Sequence[float]) -> tuple[float, ...]:
    """The means of `losses` over as many spans as a curve has points."""
    if not losses:
        return ()
    n_spans = min(MAX_LOSSES, len(losses))
    ends = [len(losses) * span // n_spans for span in range(n_spans + 1)]
    return tuple(round(fmean(losses[start:stop]), 4) for start, stop in pairwise(ends))


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


def _check_promise(request: FinetuneRequest, task: Task) -> None:
    """Raise RequestInvalid, before the training, for a target that no example will be there to prove."""
    if not request.target:
        return
    if task.spec.kind != "classify":
        raise RequestInvalid(f"--target is about labels, and the task {task.name!r} is of kind {task.spec.kind!r}")
    if not _can_choose(task):
        n = len(task.records("validation"))
        raise RequestInvalid(
            f"--target needs {MIN_EXAMPLES} validation examples, {task.name!r} has {n}: add examples, or leave it out"
        )


def _can_choose(task: Task) -> bool:
    """True if the validation examples are enough to choose a file by."""
    return len({record.prompt for record in task.records("validation")}) >= MIN_EXAMPLES


def _cut_vocabulary(task: Task, origin: Origin, out: Path, report: Reporter) -> Path:
    """The base with the tokens that the task needs, as a model in `out`, so that training reads what will be served.

    It is made once for a base and its training examples. A vocabulary that is small, or needed, stays whole.
    """
    with closing(open_checkpoint(origin.path)) as checkpoint:
        fields = checkpoint.header.fields
        n_tokens = fields[TOKENS].length or 0 if TOKENS in fields else 0
    if KEPT_FIELD in fields or n_tokens < SMALL_VOCABULARY * DEFAULT_KEEP:
        return origin.path
    train = task.file("train")
    digest = sha256(f"{origin.digest.result()} {sha256_file(train)} {task.spec.prompt}".encode()).hexdigest()[:8]
    name = f"{origin.name[:40]}-{DEFAULT_KEEP}-{digest}"
    made = Store(out / CUT_FOLDER)
    if name not in made.names():
        cut = ConvertRequest(
            source=str(origin.path if origin.manifest is None else origin.path.parent),
            trim=train,
            keep=DEFAULT_KEEP,
            quantization=HALF_PRECISION,
            manifest=out / MANIFEST_FILE,
            name=name,
        )
        try:
            convert(cut, made, report)
        except (TrimImpossible, RequestInvalid) as error:
            report.note(f"the vocabulary stays whole: {error}")
            return origin.path
    return made.get(name).gguf


def _source(base: Path, request: FinetuneRequest, origin: Origin) -> str:
    """The source for `convert`, of the base that was trained: as the user named it, a cut model's folder, or a file."""
    if base == origin.path:
        return request.base
    return str(base.parent if (base.parent / MANIFEST_FILE).is_file() else base)


def _manifest(task: Task, name: str, origin: Origin) -> Manifest:
    spec = task.spec
    return licensed(origin).model_copy(
        update={
            "name": name,
            "description": f"Fine-tuned on the task {task.name}: {spec.source or 'own examples'}.",
            "task": "classify" if spec.kind == "classify" else "write",
            "labels": spec.labels,
            "prompt": spec.manifest_prompt(),
            "compact_json": spec.kind == "extract" and json_is_compact(task.records("train")) is True,
        }
    )


def _conversion(
    request: FinetuneRequest, task: Task, manifest: Manifest, result: FinetuneResult, source: str
) -> ConvertRequest:
    """The conversion of what was trained: chosen on the validation examples, if they are enough to choose by."""
    is_adapter = result.trained.is_dir()
    out = result.trained if is_adapter else result.trained.parent
    write_atomic(out / MANIFEST_FILE, dump_manifest(manifest))
    return ConvertRequest(
        source=source if is_adapter else str(result.trained),
        adapter=out if is_adapter else None,
        examples=task.file("validation") if _can_choose(task) else None,
        target=request.target,
        name=manifest.name,
        manifest=out / MANIFEST_FILE,
        replace=request.replace,
    )
