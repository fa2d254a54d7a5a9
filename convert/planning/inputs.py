"""The inputs of a conversion: from a request to weights, an adapter, examples and the manifest to be written.

SOURCE is a recipe of the catalogue, which brings its adapter and manifest, or a checkpoint (see `origin`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from convert.errors import AdapterInvalid, RequestInvalid
from convert.lora.adapter import PeftAdapter, read_adapter
from convert.measure.examples import Split, json_is_compact, labels_of, prompt_of, split_examples
from convert.quantize.quantize import DEFAULT_QUANTIZATION, spec_named
from convert.trim.plan import DEFAULT_KEEP
from models.common.chat_records import ChatRecord, answers_repeat, read_chat_records
from models.common.console import Reporter
from models.common.files import sha256_file
from models.errors import HashMismatch
from models.manifest import MANIFEST_FILE, Base, Conversion, Manifest, Prompt, read_manifest
from models.manifest import Adapter as AdapterRecord
from models.quality import QUALITY_FILE, LossBudget, TaskKind
from models.store.catalog import CatalogEntry, load_catalog
from models.store.store import Store, check_name
from models.task.task import Task, open_task

from .origin import Origin, find_origin
from .request import ConvertRequest

KEEP = "keep"
"""The value of --quant that leaves a GGUF's weights as they are."""


@dataclass(frozen=True)
class Examples:
    """The user's examples, and the loss allowed on them. `labels` are the possible answers; none for work to write."""

    path: Path
    sha256: str
    split: Split
    labels: tuple[str, ...]
    work: TaskKind
    budget: LossBudget

    @property
    def records(self) -> tuple[ChatRecord, ...]:
        """All distinct examples."""
        return self.split.calibration + self.split.held_out


@dataclass(frozen=True)
class TrimRequest:
    """Texts that the trimmed vocabulary must tokenise as before, and its size in tokens."""

    records: tuple[ChatRecord, ...]
    keep: int


@dataclass(frozen=True)
class Inputs:
    """All inputs, checked. `manifest` is the one to be installed, without base and artefacts so far.

    `quantization` is None if the examples decide. `recipe_quality` is the folder of a recipe with measurements of its
    own, `imatrix` the importance matrix to quantize with; with examples the matrix is collected from these instead.
    `targets` are those to find thresholds for; none: the usual ones.
    """

    origin: Origin
    adapter: PeftAdapter | None
    quantization: str | None
    manifest: Manifest
    examples: Examples | None = None
    trim: TrimRequest | None = None
    recipe_quality: Path | None = None
    imatrix: Path | None = None
    targets: tuple[float, ...] = ()

    @property
    def base(self) -> Base:
        """The manifest's entry for the weights, with their address if the manifest has one for the same sha256."""
        base, before = self.origin.base, self.manifest.base
        if before is not None and before.source and before.sha256 == base.sha256:
            return base.model_copy(update={"source": before.source})
        return base


def gather(request: ConvertRequest, store: Store, report: Reporter) -> Inputs:
    """Find and check what the request names. Raises RequestInvalid, AdapterInvalid and ModelErrors."""
    task = open_task(request.task) if request.task is not None else None
    if task is not None:
        request = _with_examples(request, task)
    _check_options(request)
    inputs = _gathered(request, task, store, report)
    if request.target and (inputs.examples is None or inputs.examples.work != "classify"):
        raise RequestInvalid("--target is about labels, and the answers of the examples are texts (--for classify?)")
    return replace(inputs, targets=request.target)


def _gathered(request: ConvertRequest, task: Task | None, store: Store, report: Reporter) -> Inputs:
    recipe, quantization = _recipe(request), _quantization(request)
    if request.hot:
        _check_hot(request, recipe)
    if quantization == KEEP:
        _check_keep(request, recipe)
    if recipe is not None:
        return _from_recipe(request, recipe, quantization, store, report)
    if request.name is None:
        raise RequestInvalid(f"--name is missing: the name of the model to make from {request.source!r}")
    name = check_name(request.name)
    adapter = read_adapter(request.adapter) if request.adapter is not None else None
    given = read_manifest(request.manifest) if request.manifest is not None else None
    of_task = _of_task(task)
    stated = given if task is None else (given or Manifest(name=name, licence="")).model_copy(update=of_task)
    examples, trim = _examples(request, stated), _trim(request)
    origin = find_origin(request.source, request.gguf, store, report)
    if quantization == KEEP and not origin.path.is_file():
        raise RequestInvalid(f"--quant {KEEP} keeps the weights of a GGUF; {request.source!r} is a checkpoint: use F16")
    described = given or _inherited(origin, adapter)
    if described.labels and stated is None:
        examples = _examples(request, described)
    learnt = _learnt(described, examples).model_copy(update=of_task)
    manifest = _complete(learnt, name, adapter, hot=request.hot)
    # the manifest may describe the conversion of another model
    manifest = manifest.model_copy(update={"conversion": None, "calibration": None})
    return Inputs(origin, adapter, quantization, manifest, examples, trim)


def _with_examples(request: ConvertRequest, task: Task) -> ConvertRequest:
    """The request with the task's validation split as its examples. Raises RequestInvalid and BadTask."""
    if request.examples is not None:
        raise RequestInvalid(f"--task {request.task} has examples of its own: leave out --examples, or --task")
    task.records("validation")
    work = request.work or ("classify" if task.spec.kind == "classify" else "write")
    return request.model_copy(update={"examples": task.file("validation"), "work": work})


def _of_task(task: Task | None) -> dict[str, object]:
    """The fields of a manifest that a task states: a model that answers with JSON writes."""
    if task is None:
        return {}
    kind = "classify" if task.spec.kind == "classify" else "write"
    return {"task": kind, "labels": task.spec.labels, "prompt": task.spec.manifest_prompt()}


def _check_options(request: ConvertRequest) -> None:
    if request.keep is not None and request.trim is None:
        raise RequestInvalid(f"--keep {request.keep} needs --trim-vocab FILE: the texts that must stay as they are")
    if request.whole_vocabulary and request.trim is not None:
        raise RequestInvalid(f"--whole-vocab and --trim-vocab {request.trim} exclude each other: leave out one of them")
    if request.examples is None:
        for option, value in (("--for", request.work), ("--max-loss", request.max_loss)):
            if value is not None:
                raise RequestInvalid(f"{option} {value} needs --examples FILE or --task: the examples to measure on")
        if request.target:
            raise RequestInvalid("--target needs --examples FILE or --task: the examples to prove it on")
    if request.max_loss is not None and not request.max_loss > 0:
        raise RequestInvalid(f"--max-loss is a mean KL divergence in nats above 0, got {request.max_loss}")


def _check_hot(request: ConvertRequest, recipe: CatalogEntry | None) -> None:
    if request.quantization is not None:
        message = "--hot leaves the base as it is and the adapter unquantized: leave out --quant, or --hot to merge"
        raise RequestInvalid(f"{message} (--quant is {request.quantization!r})")
    if request.target:
        raise RequestInvalid("--hot measures nothing that could prove --target: leave out one of them")
    if request.keep_f16:
        raise RequestInvalid("--hot makes no F16 model that --keep-f16 could keep: leave out one of them")
    if request.trim is not None:
        raise RequestInvalid("--hot cuts no vocabulary that --trim-vocab could be for: leave out one of them")
    if request.max_loss is not None:
        raise RequestInvalid("--hot quantizes nothing whose loss --max-loss could limit: leave out one of them")
    if request.adapter is None and recipe is None:
        raise RequestInvalid(f"--hot needs --adapter DIR: the adapter to apply to {request.source!r}")


def _check_keep(request: ConvertRequest, recipe: CatalogEntry | None) -> None:
    changing = {
        "--adapter": request.adapter is not None,
        "--trim-vocab": request.trim is not None,
        "--keep-f16": request.keep_f16,
        "--max-loss": request.max_loss is not None,
        f"the recipe {request.source!r}": recipe is not None,
    }
    for option, is_given in changing.items():
        if is_given:
            raise RequestInvalid(f"--quant {KEEP} leaves the weights as they are: leave it out, or {option}")


def _recipe(request: ConvertRequest) -> CatalogEntry | None:
    catalog = load_catalog()
    entry = catalog.get(request.source) if request.source in catalog.names() else None
    return entry if entry is not None and entry.recipe else None


# option -> the facts of a recipe that do not hold for a model made with it. "rounding" is the quantization and its
# importance matrix; "trim" the cut of the vocabulary; "figures" the measurements of the recipe's own model
_DROPPED_BY: Mapping[str, frozenset[str]] = {
    "adapter": frozenset({"rounding", "trim", "figures"}),
    "hot": frozenset({"rounding", "trim", "figures"}),
    "quantization": frozenset({"rounding", "figures"}),
    "examples": frozenset({"rounding", "figures"}),
    "trim": frozenset({"trim", "figures"}),
    "whole_vocabulary": frozenset({"trim", "figures"}),
}


def _from_recipe(
    request: ConvertRequest, entry: CatalogEntry, quantization: str | None, store: Store, report: Reporter
) -> Inputs:
    folder = entry.recipe_folder()
    recipe = read_manifest(request.manifest or folder / MANIFEST_FILE)
    adapter, origin = _recipe_weights(request, recipe, folder, store, report)
    examples, trim = _examples(request, recipe), _trim(request)
    name = check_name(request.name or recipe.name)
    manifest = _complete(_learnt(recipe, examples), name, adapter, hot=request.hot)
    settings = recipe.conversion or Conversion()
    dropped = frozenset[str]().union(*(facts for option, facts in _DROPPED_BY.items() if getattr(request, option)))
    imatrix = recipe_quality = None
    if "trim" not in dropped and settings.trim:
        trim = TrimRequest(read_chat_records(folder / settings.trim), settings.keep)
    if "rounding" not in dropped:
        quantization = spec_named(settings.quantization, imatrix=False).name
        imatrix = folder / settings.imatrix if settings.imatrix else None
    if "figures" in dropped:
        manifest = manifest.model_copy(update={"quality": (), "conversion": None, "calibration": None})
    elif (folder / QUALITY_FILE).is_file():
        recipe_quality = folder
    return Inputs(origin, adapter, quantization, manifest, examples, trim, recipe_quality, imatrix)


def _recipe_weights(
    request: ConvertRequest, recipe: Manifest, folder: Path, store: Store, report: Reporter
) -> tuple[PeftAdapter, Origin]:
    """The recipe's adapter, or the request's, and its base. Raises AdapterInvalid, HashMismatch, RequestInvalid."""
    if recipe.base is None or recipe.adapter is None:
        raise RequestInvalid(f"the recipe {request.source!r} needs a [base] and an [adapter] in its {MANIFEST_FILE}")
    adapter = read_adapter(request.adapter or folder / recipe.adapter.path)
    expected = recipe.adapter.sha256
    if request.adapter is None and expected not in {None, adapter.sha256}:
        raise AdapterInvalid(f"{str(adapter.folder)!r} has sha256 {adapter.sha256}, the recipe expects {expected}")
    origin = find_origin(recipe.base.name, None, store, report)
    if (sha256 := origin.base.sha256) != recipe.base.sha256:
        raise HashMismatch(f"{str(origin.path)!r} has sha256 {sha256}, the recipe was made on {recipe.base.sha256}")
    return adapter, origin


def _quantization(request: ConvertRequest) -> str | None:
    if request.quantization is not None and request.quantization.lower() == KEEP:
        return KEEP
    if request.quantization is not None:
        return spec_named(request.quantization, imatrix=False).name
    return None if request.examples is not None else DEFAULT_QUANTIZATION


def _examples(request: ConvertRequest, manifest: Manifest | None) -> Examples | None:
    """The examples. The request, then the manifest, then the form of the answers decides the kind of work."""
    if request.examples is None:
        return None
    records = read_chat_records(request.examples)
    stated = manifest.task if manifest is not None else "general"
    by_answers: TaskKind = "classify" if answers_repeat([record.answer for record in records]) else "write"
    work = request.work or (by_answers if stated == "general" else stated)
    budget = LossBudget() if request.max_loss is None else LossBudget(kl_mean=request.max_loss)
    labels = labels_of(records, manifest.labels if manifest is not None else ()) if work == "classify" else ()
    return Examples(request.examples, sha256_file(request.examples), split_examples(records), labels, work, budget)


def _learnt(manifest: Manifest, examples: Examples | None) -> Manifest:
    """The manifest with the task, labels and prompt of the examples, where it states none, and how they write JSON."""
    if examples is None:
        return manifest
    changes: dict[str, object] = {}
    if manifest.task == "general":
        changes["task"] = "classify" if manifest.labels else examples.work
    if not manifest.labels:
        changes["labels"] = examples.labels
        if manifest.prompt == Prompt():
            changes["prompt"] = prompt_of(examples.records)
    if (compact := json_is_compact(examples.records)) is not None:
        changes["compact_json"] = compact
    return manifest.model_copy(update=changes)


def _trim(request: ConvertRequest) -> TrimRequest | None:
    if request.trim is None:
        return None
    return TrimRequest(read_chat_records(request.trim), request.keep if request.keep is not None else DEFAULT_KEEP)


def licensed(origin: Origin) -> Manifest:
    """A manifest that states the source's licence and notice, and nothing else."""
    known = origin.manifest
    if known is None:
        return Manifest(name="source", licence=origin.licence)
    return Manifest(name="source", licence=known.licence, licence_notice=known.licence_notice)


def _inherited(origin: Origin, adapter: PeftAdapter | None) -> Manifest:
    """The source's licence and notice; also its task, labels and prompt, unless an adapter changes the task."""
    if origin.manifest is None or adapter is not None:
        return licensed(origin)
    return origin.manifest.model_copy(update={"quality": ()})


def _complete(manifest: Manifest, name: str, adapter: PeftAdapter | None, *, hot: bool) -> Manifest:
    made_with = manifest.adapter
    if adapter is not None:
        made_with = AdapterRecord(path=adapter.folder.name, sha256=adapter.sha256, rank=adapter.rank)
    kind = "adapter" if hot else "model"
    return manifest.model_copy(update={"kind": kind, "name": name, "source": "", "adapter": made_with, "artefacts": ()})
