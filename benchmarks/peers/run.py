"""The stages of a comparison with peers: servers side by side, passes interleaved, the record saved after each pass.

The servers of a stage run together and answer in turn, in an order that reverses with each repetition, so that other
load on the machine affects them alike. A cold server is a new process for each pass.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import ServerFailed
from benchmarks.load.client import ApiTarget, OpenAiClient, closed_loop
from benchmarks.load.servers import RunningServer, get_local, read_counters
from benchmarks.load.workload import LabelledExample, PromptTemplate, Talks
from benchmarks.record import RequestSample
from models.common.console import NamedProgress
from models.common.machine import load_average

from .record import Pass, PeerRun, Server, save_peer_run
from .servers import ServerPlan
from .tasks import CONVERSATIONS, DESKSIDE, FEW_SHOT, HOP, LABEL, PeerTask, asking

Slices = Mapping[tuple[str, str], Sequence[Sequence[LabelledExample]]]
SLOW_SHARE = 3
TIMEOUT_S = 1800.0
# A burst of 200 keeps llama-server busy for eleven minutes, twelve conversations for one and a half: long enough to be
# steady.
COLD_REPETITIONS = 2
COUNTERS = ("deskside_step_seconds_total", "deskside_decode_seconds_total", "deskside_steps_total")


@dataclass(frozen=True, slots=True)
class Stage:
    """Servers that run together. `work`: each task with the names of the servers that take part in it."""

    servers: Sequence[ServerPlan]
    work: Sequence[tuple[PeerTask, frozenset[str]]]
    prompt: PromptTemplate
    warmup: Sequence[LabelledExample]
    cold: bool = False


@dataclass(frozen=True, slots=True)
class PeerWorkload:
    """The requests of a comparison: every server gets `slices[task, way][repetition]`."""

    slices: Slices
    labels: tuple[str, ...]
    repetitions: int


class PeerRunFile:
    """The run so far. Every change is on disk before the next pass begins."""

    def __init__(self, run: PeerRun, path: Path) -> None:
        self.run = run
        self._path = path

    @property
    def logs(self) -> Path:
        """The folder for the servers' own output."""
        return self._path.with_suffix(".logs")

    def add(self, **changes: object) -> None:
        """Append to fields that are tuples, replace the others, and save."""
        grown = {k: (*getattr(self.run, k), *v) if isinstance(v, tuple) else v for k, v in changes.items()}
        self.run = self.run.model_copy(update=grown)
        save_peer_run(self._path, self.run)


@dataclass(frozen=True, slots=True)
class PeerSession:
    """The workload, the record and the progress display that every measurement of a comparison uses."""

    workload: PeerWorkload
    file: PeerRunFile
    progress: NamedProgress


@dataclass(frozen=True, slots=True)
class PlannedPass:
    """One pass: server, task, way of asking and repetition."""

    repetition: int
    task: PeerTask
    way: str
    plan: ServerPlan

    def __str__(self) -> str:
        return f"{self.task.name}, {self.way}: {self.plan.name}, repetition {self.repetition + 1}"


def run_stage(stage: Stage, session: PeerSession) -> None:
    """Measure every task of the stage. Raises ServerFailed when a server does not start or fails its warm-up."""
    session.file.logs.mkdir(parents=True, exist_ok=True)
    if stage.cold:
        for planned in planned_passes(stage, session.workload):
            with _started(planned.plan, session.file) as running:
                _measure(planned, running.base_url, stage, session)
        return
    with ExitStack() as stack:
        addresses = {}
        for plan in stage.servers:
            session.progress(f"{plan.name}: starting and warming up", 0, 1)
            addresses[plan.name] = stack.enter_context(_started(plan, session.file)).base_url
            _warm_up(stage, plan, addresses[plan.name], session.workload.labels)
        for planned in planned_passes(stage, session.workload):
            _measure(planned, addresses[planned.plan.name], stage, session)


def planned_passes(stage: Stage, workload: PeerWorkload) -> Iterator[PlannedPass]:
    """Yield the stage's passes in order: by repetition, by task, servers in alternating direction."""
    repetitions = min(workload.repetitions, COLD_REPETITIONS) if stage.cold else workload.repetitions
    for repetition in range(repetitions):
        for task, names in stage.work:
            for number, way in enumerate(task.ways):
                order = stage.servers if (repetition + number) % 2 == 0 else tuple(reversed(stage.servers))
                for plan in order:
                    takes_part = plan.name in names and not (plan.once and repetition)
                    if takes_part and asking(task.name, way, plan.peer, workload.labels):
                        yield PlannedPass(repetition, task, way, plan)


@contextmanager
def _started(plan: ServerPlan, file: PeerRunFile) -> Iterator[RunningServer]:
    log = file.logs / f"{len(file.run.servers):02d} {plan.name}.log"
    with plan.start(log) as running:
        facts: Server = plan.facts.model_copy(update={"start_s": running.start_s})
        file.add(servers=(facts,))
        yield running


def _warm_up(stage: Stage, plan: ServerPlan, address: str, labels: Sequence[str]) -> None:
    """Ask for labels in every way, at full concurrency, so that caches, grammars and slots are filled."""
    tasks = [task for task, names in stage.work if plan.name in names and task.name in (LABEL, FEW_SHOT)]
    for task in tasks:
        for way in task.ways:
            planned = PlannedPass(0, task, way, plan)
            samples = asyncio.run(_ask_all(planned, address, stage.prompt, stage.warmup, labels))
            if samples and all(sample.error for sample in samples):
                raise ServerFailed(f"{planned}: the warm-up failed: {samples[0].error}")


def _measure(planned: PlannedPass, address: str, stage: Stage, session: PeerSession) -> None:
    workload, plan = session.workload, planned.plan
    examples = workload.slices[planned.task.name, planned.way][planned.repetition]
    if plan.slow:
        examples = examples[: max(1, len(examples) // SLOW_SHARE)]
    session.progress(str(planned), 0, len(examples))
    before, load = _counters(plan, address), load_average()
    samples = asyncio.run(_ask_all(planned, address, stage.prompt, examples, workload.labels))
    grown = {name: value - before.get(name, 0.0) for name, value in _counters(plan, address).items()}
    made = Pass(
        task=planned.task.name,
        way=planned.way,
        server=plan.name,
        repetition=planned.repetition,
        users=planned.task.users,
        load_before=load,
        counters=grown,
        samples=samples,
    )
    session.file.add(passes=(made,))
    session.progress(str(planned), len(examples), len(examples))


async def _ask_all(
    planned: PlannedPass,
    address: str,
    prompt: PromptTemplate,
    examples: Sequence[LabelledExample],
    labels: Sequence[str],
) -> tuple[RequestSample, ...]:
    asked = asking(planned.task.name, planned.way, planned.plan.peer, labels, planned.plan.ends)
    if asked is None:
        return ()
    endpoint, fields = asked
    origin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - origin

    # A server may close a kept connection just as the next request is sent on it: llama-server's does. One connection
    # per request costs every server the same; only the measurement of our own hop keeps its one connection.
    target = ApiTarget(address, served_name(address))
    client = OpenAiClient(target, clock, timeout_s=TIMEOUT_S, keep_alive=planned.task.name == HOP)
    send = {"chat": client.chat, "completions": client.complete, "decisions": client.decide}[endpoint]
    if planned.task.name == CONVERSATIONS:
        send = Talks(client.chat).turn

    async def ask(example: LabelledExample, scheduled: float) -> RequestSample:
        return await send(example, prompt.render(example.text), scheduled, **fields)

    try:
        return await closed_loop(examples, planned.task.users, ask, clock)
    finally:
        await client.close()


def served_name(address: str) -> str:
    """The name of the first model that the server at `address` (`…/v1`) lists."""
    models = get_local(f"{address}/models").json()["data"]
    return str(models[0]["id"])


def _counters(plan: ServerPlan, address: str) -> dict[str, float]:
    if plan.peer != DESKSIDE:
        return {}
    text = get_local(f"{address.removesuffix('/v1')}/metrics").text
    return read_counters(text, COUNTERS)
