"""The order of a comparison: servers up side by side, passes interleaved between them, the file saved after each pass.

Servers of one stage stay up together and answer in turn, in an order that is reversed with each repetition, so that
whatever else the machine does in those minutes meets all of them alike. A cold server is a fresh process each time.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.errors import ServerFailed
from benchmarks.load.client import OpenAiClient
from benchmarks.load.loop import closed_loop
from benchmarks.load.servers import RunningServer, read_counters
from benchmarks.load.workload import LabelledExample, PromptTemplate
from benchmarks.record import RequestSample, load_average
from models.common.console import NamedProgress

from .record import Pass, PeerRun, Server, save_peer_run
from .servers import ServerPlan
from .tasks import DESKSIDE, FEW_SHOT, HOP, LABEL, PeerTask, asking

Slices = Mapping[tuple[str, str], Sequence[Sequence[LabelledExample]]]
SLOW_SHARE = 3
TIMEOUT_S = 1800.0
# A burst of 200 keeps llama-server busy for eleven minutes, and is long enough to be steady.
COLD_REPETITIONS = 2
COUNTERS = ("deskside_step_seconds_total", "deskside_decode_seconds_total", "deskside_steps_total")


@dataclass(frozen=True, slots=True)
class Stage:
    """Servers that are up together. `work`: each task, with the names of the servers that take part in it."""

    servers: Sequence[ServerPlan]
    work: Sequence[tuple[PeerTask, frozenset[str]]]
    prompt: PromptTemplate
    warmup: Sequence[LabelledExample]
    cold: bool = False


@dataclass(frozen=True, slots=True)
class PeerWorkload:
    """What a comparison needs beside its stages. `slices[task, way][repetition]` is what every server is asked."""

    slices: Slices
    labels: tuple[str, ...]
    repetitions: int
    out: Path

    @property
    def logs(self) -> Path:
        """Where the servers' own output goes."""
        return self.out.with_suffix(".logs")


class PeerRunFile:
    """The run so far; every change is on disk before the next pass begins."""

    def __init__(self, run: PeerRun, out: Path) -> None:
        self.run = run
        self._out = out

    def add(self, **changes: object) -> None:
        """Append to fields that are tuples, replace the others, and save."""
        grown = {k: (*getattr(self.run, k), *v) if isinstance(v, tuple) else v for k, v in changes.items()}
        self.run = self.run.model_copy(update=grown)
        save_peer_run(self._out, self.run)


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """One pass to come: which server answers which task, asked how, for the how-manieth time."""

    repetition: int
    task: PeerTask
    way: str
    plan: ServerPlan

    def __str__(self) -> str:
        return f"{self.task.name}, {self.way}: {self.plan.name}, repetition {self.repetition + 1}"


def run_stage(stage: Stage, comparison: PeerWorkload, recorder: PeerRunFile, progress: NamedProgress) -> None:
    """Measure every task of the stage. Raises ServerFailed when a server does not start or fails its warm-up."""
    comparison.logs.mkdir(parents=True, exist_ok=True)
    if stage.cold:
        for turn in planned_passes(stage, comparison):
            with _started(turn.plan, comparison.logs, recorder) as running:
                _measure(turn, running.base_url, stage, comparison, recorder, progress)
        return
    with ExitStack() as stack:
        addresses = {}
        for plan in stage.servers:
            progress(f"{plan.name}: starting and warming up", 0, 1)
            addresses[plan.name] = stack.enter_context(_started(plan, comparison.logs, recorder)).base_url
            _warm_up(stage, plan, addresses[plan.name], comparison.labels)
        for turn in planned_passes(stage, comparison):
            _measure(turn, addresses[turn.plan.name], stage, comparison, recorder, progress)


def planned_passes(stage: Stage, comparison: PeerWorkload) -> Iterator[PlannedPass]:
    """Every pass of a stage in its order: repetition by repetition, task by task, the servers to and fro."""
    repetitions = min(comparison.repetitions, COLD_REPETITIONS) if stage.cold else comparison.repetitions
    for repetition in range(repetitions):
        for task, names in stage.work:
            for number, way in enumerate(task.ways):
                order = stage.servers if (repetition + number) % 2 == 0 else tuple(reversed(stage.servers))
                for plan in order:
                    takes_part = plan.name in names and not (plan.once and repetition)
                    if takes_part and asking(task.name, way, plan.peer, comparison.labels):
                        yield PlannedPass(repetition, task, way, plan)


@contextmanager
def _started(plan: ServerPlan, logs: Path, recorder: PeerRunFile) -> Iterator[RunningServer]:
    log = logs / f"{len(recorder.run.servers):02d} {plan.name}.log"
    with plan.start(log) as running:
        facts: Server = plan.facts.model_copy(update={"start_s": running.start_s})
        recorder.add(servers=(facts,))
        yield running


def _warm_up(stage: Stage, plan: ServerPlan, address: str, labels: Sequence[str]) -> None:
    """Every way of asking for a label is tried, as many at a time as later: caches, grammars and slots are filled."""
    tasks = [task for task, names in stage.work if plan.name in names and task.name in (LABEL, FEW_SHOT)]
    for task in tasks:
        for way in task.ways:
            turn = PlannedPass(0, task, way, plan)
            samples = asyncio.run(_ask_all(turn, address, stage.prompt, stage.warmup, labels))
            if samples and all(sample.error for sample in samples):
                raise ServerFailed(f"{turn}: the warm-up failed: {samples[0].error}")


def _measure(
    turn: PlannedPass,
    address: str,
    stage: Stage,
    comparison: PeerWorkload,
    recorder: PeerRunFile,
    progress: NamedProgress,
) -> None:
    examples = comparison.slices[turn.task.name, turn.way][turn.repetition]
    if turn.plan.slow:
        examples = examples[: max(1, len(examples) // SLOW_SHARE)]
    progress(str(turn), 0, len(examples))
    before, load = _counters(turn.plan, address), load_average()
    samples = asyncio.run(_ask_all(turn, address, stage.prompt, examples, comparison.labels))
    grown = {name: value - before.get(name, 0.0) for name, value in _counters(turn.plan, address).items()}
    made = Pass(
        task=turn.task.name,
        way=turn.way,
        server=turn.plan.name,
        repetition=turn.repetition,
        users=turn.task.users,
        load_before=load,
        counters=grown,
        samples=samples,
    )
    recorder.add(passes=(made,))
    progress(str(turn), len(examples), len(examples))


async def _ask_all(
    turn: PlannedPass, address: str, prompt: PromptTemplate, examples: Sequence[LabelledExample], labels: Sequence[str]
) -> tuple[RequestSample, ...]:
    asked = asking(turn.task.name, turn.way, turn.plan.peer, labels, turn.plan.ends)
    if asked is None:
        return ()
    endpoint, fields = asked
    origin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - origin

    # A server may close a kept connection just as the next request is sent on it: llama-server's does. One connection
    # for each request costs every server the same; only where our own hop is measured, a client of one keeps its own.
    client = OpenAiClient(
        address, _served_name(address), timeout_s=TIMEOUT_S, keep_alive=turn.task.name == HOP, clock=clock
    )
    send = {"chat": client.chat, "completions": client.complete, "decisions": client.decide}[endpoint]

    async def ask(example: LabelledExample, scheduled: float) -> RequestSample:
        return await send(example, prompt.render(example.text), scheduled, **fields)

    try:
        return await closed_loop(examples, turn.task.users, ask, clock)
    finally:
        await client.close()


def _served_name(address: str) -> str:
    models = httpx.get(f"{address}/models", trust_env=False, timeout=30).json()["data"]
    return str(models[0]["id"])


def _counters(plan: ServerPlan, address: str) -> dict[str, float]:
    if plan.peer != DESKSIDE:
        return {}
    text = httpx.get(f"{address.removesuffix('/v1')}/metrics", trust_env=False, timeout=30).text
    return read_counters(text, COUNTERS)
