"""`deskside compare`: its options, and the comparison that they ask for, checked before anything is asked."""

import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks.comparison.arms import KEY_VARIABLE
from benchmarks.comparison.run import hosted_body, require_labels
from benchmarks.cost import CallPrice, known_price
from benchmarks.errors import BadWorkload
from benchmarks.load.servers import BASE
from benchmarks.load.workload import labelled
from benchmarks.record import results_file
from models.common.chat_records import ChatRecord
from models.common.options import Flag
from models.common.record import Record
from models.errors import did_you_mean
from models.store.store import Store, StoredModel
from models.task.task import Task

from .hosted import HostedRecording, load_calls, read_price

COUNTED = ("majority", "words", "vote", "nearest")
OF_BASE = ("zero-shot", "few-shot", "retrieved")
FINE_TUNE, MIXED, HOSTED = "fine-tune", "fine-tune+vote", "hosted"
WAYS = (*COUNTED, *OF_BASE, FINE_TUNE, MIXED, HOSTED)
QUICK = 64


class CompareSettings(Record):
    """The options of `deskside compare`."""

    model: Annotated[str | None, Flag(metavar="NAME", shown="the task's name, if installed")] = Field(
        default=None, description="The fine-tune: a model of the store, or a path."
    )
    base: Annotated[str | None, Flag(metavar="NAME", shown="the fine-tune's base")] = Field(
        default=None, description="The base model, asked with and without examples."
    )
    ways: Annotated[tuple[str, ...], Flag(metavar="WAYS", shown="all")] = Field(
        default=(), description=f"Some of {', '.join(WAYS)}."
    )
    shots: int = Field(default=8, ge=1, le=64, description="Examples in a few-shot or retrieved prompt.")
    quick: bool = Field(default=False, description=f"Only {QUICK} examples of each split: shows that everything works.")
    curve: bool = Field(default=False, description="Also what 100, 200, 400 and 800 examples would have given.")
    concurrency: int = Field(default=8, ge=1, description="Requests at a time.")
    local_url: Annotated[str | None, Flag(metavar="URL")] = Field(
        default=None, description="A running `deskside serve` (…/v1) with both models, instead of starting one."
    )
    url: Annotated[str | None, Flag(metavar="URL")] = Field(
        default=None, description=f"A hosted API (…/v1). Its key is read from ${KEY_VARIABLE}."
    )
    hosted_model: Annotated[str | None, Flag(metavar="NAME")] = Field(default=None, description="The model at --url.")
    hosted_body: Annotated[str, Flag(metavar="JSON")] = Field(
        default="{}", description="Fields for each hosted request; a null removes one."
    )
    max_cost: Annotated[float | None, Flag(metavar="USD")] = Field(
        default=None, gt=0, description="The most that all hosted calls may cost. Needed with --url."
    )
    price: Annotated[str | None, Flag(metavar="IN,OUT", shown="genai-prices")] = Field(
        default=None, description="Hosted price in $ per million tokens."
    )
    record: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Keep each hosted call: timing, usage and answer."
    )
    replay: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Take hosted answers from such a file; nothing is sent."
    )
    out: Annotated[Path | None, Flag(metavar="FILE", shown="results/compare-TASK-<now>.json")] = Field(
        default=None, description="Keep each answer here; a second run asks what is missing."
    )


@dataclass(frozen=True, slots=True)
class HostedPlan:
    """The hosted API to ask within `max_cost`, or the recording in its place."""

    url: str
    model: str
    body: Mapping[str, Any]
    max_cost: float = 0.0
    price: CallPrice | None = None
    replayed: HostedRecording | None = None


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """A comparison to run. `skipped` has a reason for each way that cannot be measured."""

    task: Task
    settings: CompareSettings
    ways: tuple[str, ...]
    skipped: Mapping[str, str]
    train: Sequence[ChatRecord]
    validation: Sequence[ChatRecord]
    test: Sequence[ChatRecord]
    model: StoredModel | None
    base: StoredModel | None
    hosted: HostedPlan | None
    out: Path


def compare_plan(task: Task, settings: CompareSettings, store: Store) -> ComparePlan:
    """Resolve the models and the ways. Raises ModelNotFound, BadTask, BadWorkload, BadRecord."""
    wanted = _wanted(settings)
    hosted = _hosted(settings, task) if not settings.ways or HOSTED in settings.ways else None
    skipped = {name: why for name in wanted if (why := _not_for(name, task))}
    model, why_no_model = _fine_tune(task, settings, store, wanted)
    base, why_no_base = _base(model, settings, store, wanted)
    for names, found, why in (((FINE_TUNE, MIXED), model, why_no_model), (OF_BASE, base, why_no_base)):
        if found is None:
            skipped |= {name: why for name in names if name in wanted and name not in skipped}
    if HOSTED in wanted and hosted is None:
        skipped[HOSTED] = "no hosted API was given: --url URL --hosted-model NAME --max-cost USD, or --replay FILE"
    test = _drawn(task.records("test"), settings)
    if model is not None:
        path = task.file("test")
        require_labels(model, [labelled(record, path) for record in task.records("test")])
    return ComparePlan(
        task=task,
        settings=settings,
        ways=tuple(name for name in WAYS if name in wanted),
        skipped=skipped,
        train=task.records("train"),
        validation=_drawn(task.records("validation"), settings),
        test=test,
        model=model,
        base=base,
        hosted=hosted,
        out=settings.out or results_file(f"compare-{task.name}"),
    )


def _wanted(settings: CompareSettings) -> set[str]:
    for name in settings.ways:
        if name not in WAYS:
            near = did_you_mean(name, WAYS) or f"; ways are {', '.join(WAYS)}"
            raise BadWorkload(f"--ways: there is no way {name!r}{near}")
    wanted = set(settings.ways or WAYS)
    # The mixture is made of the fine-tune's answers, and is judged beside it.
    return wanted | ({FINE_TUNE} if MIXED in wanted else set())


def _not_for(name: str, task: Task) -> str:
    """The reason why a way makes no sense for the task's kind; empty if it does."""
    if task.spec.labels:
        return "one of the numbers of voters that 'vote' chooses from" if name == "nearest" else ""
    return {
        "words": "chooses among labels, and this task's answers are none; 'nearest' answers instead",
        "vote": "chooses among labels, and this task's answers are none; 'nearest' answers instead",
        MIXED: "mixes probabilities of labels, and this task's answers are none",
    }.get(name, "")


def _fine_tune(task: Task, settings: CompareSettings, store: Store, wanted: set[str]) -> tuple[StoredModel | None, str]:
    if FINE_TUNE not in wanted:
        return None, ""
    if settings.model is not None:
        return store.resolve(settings.model), ""
    for name in (task.name, task.name.replace("_", "-")):
        if name in store.names():
            return store.get(name), ""
    train = shlex.join(["deskside", "finetune", task.address, "--name", task.name.replace("_", "-")])
    return None, f"no model {task.name!r} is installed; --model NAME gives another, `{train}` makes one"


def _base(
    model: StoredModel | None, settings: CompareSettings, store: Store, wanted: set[str]
) -> tuple[StoredModel | None, str]:
    if not wanted & set(OF_BASE):
        return None, ""
    if settings.base is not None:
        return store.resolve(settings.base), ""
    of_model = model.manifest.base.name if model is not None and model.manifest and model.manifest.base else ""
    for name in (of_model, BASE):
        if name in store.names():
            return store.get(name), ""
    return None, f"no base model is installed; `deskside pull {BASE}` installs one, --base NAME gives another"


def _hosted(settings: CompareSettings, task: Task) -> HostedPlan | None:
    if settings.replay is not None:
        if settings.url is not None or settings.record is not None:
            raise BadWorkload("--replay takes the answers from a file: leave out --url and --record, or --replay")
        recording = load_calls(settings.replay)
        if recording.task != task.name:
            raise BadWorkload(
                f"{str(settings.replay)!r} was recorded on the task {recording.task!r}, not on {task.name!r}"
            )
        body = hosted_body(settings.hosted_body)
        return HostedPlan(recording.url, recording.model, body, replayed=recording)
    if settings.url is None:
        if settings.record is not None:
            raise BadWorkload("--record keeps the calls of a hosted API: give it with --url")
        return None
    if settings.hosted_model is None:
        raise BadWorkload("--url needs --hosted-model NAME, the model to ask there")
    if settings.max_cost is None:
        raise BadWorkload("--url may cost money: give --max-cost USD, the most that all its calls may cost together")
    today = datetime.now(UTC).date()
    price = read_price(settings.price) or known_price(settings.hosted_model, settings.url, today)
    if price is None:
        raise BadWorkload(
            f"the price of {settings.hosted_model!r} at {settings.url} is not known, and --max-cost needs it: give "
            "--price IN,OUT in $ per million tokens (0,0 for a server of your own)"
        )
    body = hosted_body(settings.hosted_body)
    return HostedPlan(settings.url, settings.hosted_model, body, settings.max_cost, price)


def _drawn(records: tuple[ChatRecord, ...], settings: CompareSettings) -> Sequence[ChatRecord]:
    """All of the examples, or the same few each time, in the file's order."""
    if not settings.quick or len(records) <= QUICK:
        return records
    rows = sorted(random.Random(0).sample(range(len(records)), QUICK))
    return [records[row] for row in rows]
