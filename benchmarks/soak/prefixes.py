"""`deskside bench prefixes`: conversations over a restart, few-shot prompts asked twice, memory over many requests.

    restart    everybody's turns in turn; the engine, or the whole server, gets SIGKILL in the middle
    few-shot   many long prompts, one at a time, then the same again: from memory, and from disk
    flat       many short prompts, 16 at a time: the memory of all processes on the way

Each bar is computed from the record alone.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import typer
from pydantic import Field
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BadWorkload, ServerFailed
from benchmarks.load.client import ApiTarget, OpenAiClient, closed_loop
from benchmarks.load.servers import RunningServer, get_local, model_file, read_counters, recipe_file, tree_bytes
from benchmarks.load.workload import (
    LabelledExample,
    Talks,
    conversation_cells,
    conversation_turns,
    few_shot_prompts,
    person_and_turn,
    read_examples,
    short_prompts,
)
from benchmarks.peers.run import served_name
from benchmarks.peers.servers import RAM, ServerPlan, deskside_plan, installed_peers, llama_server_plan
from benchmarks.peers.tasks import CHAT, CONVERSATIONS, asking
from benchmarks.record import RequestSample, load_record, now_text, results_file, save_json, this_machine
from models.common.console import NamedProgress, page, show_progress
from models.common.machine import logical_cores, mebibytes
from models.common.options import JsonOption, ReportOption, with_options
from models.common.record import Record
from models.errors import SOME_FAILED
from models.store.catalog import DEFAULT_MODEL
from models.store.store import Store

from .checks import (
    AT_THE_END,
    ENGINE_KILLED,
    ON_THE_WAY,
    OURS,
    PREFIX_GAUGES,
    SERVER_KILLED,
    SNAPSHOTS,
    THEIRS,
    MemoryPoint,
    PrefixRun,
    RoundsPass,
    TalkPass,
    bars,
    first_token_ms,
    kept_share,
    kill_engine,
)

RESTART, FEW_SHOT, FLAT = "restart", "few-shot", "flat"
NOTED = ("people", "turns", "kill_after", "repetitions", "seed", "quick")
QUICK = {"people": 4, "turns": 3, "prompts": 8, "requests": 240, "repetitions": 1}
ANSWER: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
USERS = 16
# A fifth of the requests fills every cache that is not one of prefixes.
SETTLED = 5
IDLE_S = 3.0
# An engine that had no work for ten seconds gives the KV cache's memory back.
RESTED_S = 12.0
TIMEOUT_S = 1800.0
BACK_S = 60.0
MARKS = {True: "met", False: "missed", None: "not measured"}


class PrefixSettings(Record):
    """The options of `deskside bench prefixes`. `quick` changes the defaults that make it long."""

    model: str = Field(default=DEFAULT_MODEL, description="The model that is served.")
    stages: str = Field(default=f"{RESTART},{FEW_SHOT},{FLAT}", description="Parts to run.")
    people: int = Field(default=12, ge=1, description="People who converse in turn, one request at a time.")
    turns: int = Field(default=4, ge=2, description="Turns of each conversation, with 600 tokens of new text each.")
    kill_after: int = Field(default=2, ge=1, description="The turn of everybody after which SIGKILL comes.")
    repetitions: int = Field(default=2, ge=1, description="Times the conversations are held, in alternating order.")
    prompts: int = Field(default=200, ge=1, description="Different few-shot prompts of 1,100 tokens.")
    memory: float = Field(default=2.5, gt=0, description="GiB for snapshots where all of these prompts shall fit.")
    requests: int = Field(default=2000, ge=10, description="Different short prompts; the bar is for 10000.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of every server (default: all cores).")
    seed: int = Field(default=0, description="Seed of the few-shot prompts.")
    quick: bool = Field(default=False, description="Few requests: a check that everything works, not a measurement.")
    folder: Path = Field(default=Path(".bench-peers"), description="The folder of `bench peers`, for llama-server.")
    out: Path | None = Field(default=None, description="JSON file (default: results/prefixes-<time>.json).")

    def effective(self) -> "PrefixSettings":
        """These settings; with `quick`, its numbers replace the defaults."""
        given = self.model_fields_set
        changes = {name: value for name, value in QUICK.items() if name not in given} if self.quick else {}
        return self.model_copy(update=changes)


@with_options(settings=PrefixSettings)
def prefixes_command(settings: PrefixSettings, as_json: JsonOption = False, report: ReportOption = None) -> None:
    """Measure prefixes that were computed before: over a restart, in long prompts asked again, and their memory."""
    if report is not None:
        run = load_record(report, PrefixRun, "is not a measurement of prefixes")
    else:
        with show_progress() as progress:
            run, out = _measured(settings.effective(), progress)
        print(f"raw samples: {out}; the servers' own output: {out.with_suffix('.logs')}", file=sys.stderr)
    if as_json:
        shown = run.model_dump(mode="json", exclude={"talks", "rounds", "short"})
        print(json.dumps(shown | {"bars": [bar.model_dump() for bar in bars(run)]}, ensure_ascii=False, indent=2))
    else:
        render_prefixes(run, page())
    if run.failed:
        raise typer.Exit(SOME_FAILED)


@dataclass(frozen=True, slots=True)
class PrefixInputs:
    """Deskside by its flags, llama-server if it is installed, the mails of the prompts, and a folder for files."""

    ours: Callable[[Sequence[str]], ServerPlan]
    theirs: ServerPlan | None
    mails: Sequence[LabelledExample]
    scratch: Path


class PrefixSession:
    """A run in progress, on disk after each pass. `idle_s` are the waits before memory at rest is read."""

    def __init__(self, settings: PrefixSettings, run: PrefixRun, out: Path, inputs: PrefixInputs) -> None:
        self.run = run
        self.idle_s = (IDLE_S, RESTED_S)
        self._settings = settings
        self._out = out
        self._inputs = inputs
        self._logs = out.with_suffix(".logs")
        self._n_starts = 0
        self._logs.mkdir(parents=True, exist_ok=True)

    def add(self, **changes: Any) -> None:
        """Append to fields that are tuples, replace the others, and save."""
        grown = {k: (*getattr(self.run, k), *v) if isinstance(v, tuple) else v for k, v in changes.items()}
        self.run = self.run.model_copy(update=grown)
        save_json(self._out, self.run.model_dump(mode="json"))

    def talk(self, progress: NamedProgress) -> None:
        """Hold the conversations: unbroken, over each kill, and with llama-server; the order alternates."""
        given = self._settings
        turns = conversation_turns(self._inputs.mails, given.people, given.turns)
        names = [OURS, ENGINE_KILLED, SERVER_KILLED, *([THEIRS] if self._inputs.theirs else [])]
        for repetition in range(given.repetitions):
            for name in names if repetition % 2 == 0 else reversed(names):
                progress(f"conversations, {name}, repetition {repetition + 1}", 0, len(turns))
                ready_s, samples = asyncio.run(self._talk(name, turns))
                self.add(talks=(TalkPass(name=name, repetition=repetition, ready_s=ready_s, samples=samples),))
                progress(f"conversations, {name}, repetition {repetition + 1}", len(turns), len(turns))

    def ask_twice(self, progress: NamedProgress) -> None:
        """Ask the few-shot prompts in two rounds, of servers with other stores of prefixes."""
        given = self._settings
        prompts = few_shot_prompts(self._inputs.mails, given.prompts, given.seed)
        disk = self._folder()
        stores = (("default settings", ()), (f"--prefix-memory {given.memory:g}", ("--prefix-memory", given.memory)))
        for shown, flags in (*stores, ("--prefix-disk DIR", ("--prefix-disk", disk))):
            gauges, rounds = [], []
            with self._start(self._inputs.ours([*map(str, flags)])) as server:
                for number in range(2):
                    progress(f"few-shot prompts, {shown}, round {number + 1}", 0, len(prompts))
                    rounds.append(asyncio.run(_asked(server, prompts, 1)))
                    gauges.append(_gauges(server))
                    progress(f"few-shot prompts, {shown}, round {number + 1}", len(prompts), len(prompts))
            on_disk = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
            made = RoundsPass(flags=shown, rounds=tuple(rounds), gauges=tuple(gauges), disk_bytes=on_disk)
            self.add(rounds=(made,))

    def fill(self, progress: NamedProgress) -> None:
        """Send the short prompts, and note the memory before, on the way, at the end and at rest."""
        prompts = short_prompts(self._inputs.mails, self._settings.requests)
        early = len(prompts) // SETTLED
        with self._start(self._inputs.ours(())) as server:
            self._note(server, "idle after the load", 0, self.idle_s[0])
            for part, when in ((prompts[:early], ON_THE_WAY), (prompts[early:], AT_THE_END)):
                progress("short prompts", len(self.run.short), len(prompts))
                self.add(short=asyncio.run(_asked(server, part, USERS)))
                self._note(server, when, len(self.run.short), 0.0)
            progress("short prompts", len(prompts), len(prompts))
            self._note(server, f"idle for {self.idle_s[0]:g} s", len(prompts), self.idle_s[0])
            self._note(server, f"idle for {sum(self.idle_s):g} s", len(prompts), self.idle_s[1])

    async def _talk(
        self, name: str, turns: Sequence[LabelledExample]
    ) -> tuple[float | None, tuple[RequestSample, ...]]:
        killed = name in (ENGINE_KILLED, SERVER_KILLED)
        flags = ["--prefix-disk", str(self._folder())] if killed else []
        plan = self._inputs.theirs if name == THEIRS else self._inputs.ours(flags)
        assert plan is not None
        asked = asking(CONVERSATIONS, CHAT, plan.peer, ())
        assert asked is not None
        clock, ready_s, samples = _clock(), None, list[RequestSample]()
        with ExitStack() as stack:
            server = stack.enter_context(self._start(plan))
            clients = [_client(server, clock)]
            talks = Talks(lambda *sent, **fields: clients[-1].chat(*sent, **fields))
            for number, example in enumerate(turns):
                if killed and number == self._settings.people * self._settings.kill_after:
                    began = clock()
                    if name == ENGINE_KILLED:
                        _kill_engine(server)
                    else:
                        assert server.pid is not None
                        os.kill(server.pid, signal.SIGKILL)
                        stack.close()
                        server = stack.enter_context(self._start(plan))
                        await clients[-1].close()
                        clients.append(_client(server, clock))
                    ready_s = clock() - began
                samples.append(await talks.turn(example, example.text, clock(), **asked[1]))
            await clients[-1].close()
        return ready_s, tuple(samples)

    def _start(self, plan: ServerPlan) -> Any:
        self._n_starts += 1
        return plan.start(self._logs / f"{self._n_starts:02d} {plan.peer}.log")

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._inputs.scratch))

    def _note(self, server: RunningServer, when: str, requests: int, after_s: float) -> None:
        time.sleep(after_s)
        used = tree_bytes(server.pid) if server.pid is not None else 0
        held = _gauges(server).get(SNAPSHOTS, 0.0)
        self.add(memory=(MemoryPoint(when=when, requests=requests, tree_bytes=used, snapshot_bytes=held),))


def render_prefixes(run: PrefixRun, console: Console) -> None:
    """Print the bars, every figure, and how it was measured."""
    for bar in bars(run):
        console.print(f"{MARKS[bar.passed]}: {bar.name}: {bar.found}")
    tables = [*([_talk_table(run)] if run.talks else []), *([_round_table(run)] if run.rounds else [])]
    for table in (*tables, *([_memory_table(run)] if run.memory else [])):
        console.print()
        console.print(table)
    console.print()
    for line in _heading(run):
        console.print(line)


def _measured(settings: PrefixSettings, progress: NamedProgress) -> tuple[PrefixRun, Path]:
    """Measure what `settings` ask for; returns the run and its file. Raises BenchError and ModelError."""
    if settings.kill_after >= settings.turns:
        raise BadWorkload(f"--kill-after {settings.kill_after} leaves no turn of {settings.turns} to measure")
    stored = Store().resolve(settings.model)
    file = model_file(stored)
    threads = settings.threads or logical_cores()
    python = installed_peers(settings.folder.absolute() / "venv")
    theirs = llama_server_plan(file, threads, RAM, python, conversation_cells(settings.turns)) if python else None
    missing = f"not in {str(settings.folder)!r}, where `deskside bench peers` installs it: llama-server is left out"
    if theirs is None and RESTART in settings.stages:
        print(missing, file=sys.stderr)
    run = PrefixRun(
        started_at=now_text(),
        machine=this_machine(),
        model=stored.name,
        quantization=file.quantization,
        sha256=file.sha256,
        threads=threads,
        workload="mails of email-triage's train split",
        peer=theirs.facts.settings if theirs else missing,
        **{name: getattr(settings, name) for name in NOTED},
    )
    out = settings.out or results_file("prefixes")
    mails = read_examples(recipe_file("data", "train.jsonl.gz"))
    with tempfile.TemporaryDirectory(prefix="deskside-prefixes-", ignore_cleanup_errors=True) as scratch:
        inputs = PrefixInputs(partial(deskside_plan, file, threads), theirs, mails, Path(scratch))
        session = PrefixSession(settings, run, out, inputs)
        for name, stage in ((RESTART, session.talk), (FEW_SHOT, session.ask_twice), (FLAT, session.fill)):
            if name in settings.stages.split(","):
                stage(progress)
    session.add(finished_at=now_text())
    return session.run, out


def _clock() -> Callable[[], float]:
    origin = time.perf_counter()
    return lambda: time.perf_counter() - origin


def _client(server: RunningServer, clock: Callable[[], float]) -> OpenAiClient:
    target = ApiTarget(server.base_url, served_name(server.base_url))
    return OpenAiClient(target, clock, timeout_s=TIMEOUT_S, keep_alive=False)


async def _asked(server: RunningServer, prompts: Sequence[LabelledExample], users: int) -> tuple[RequestSample, ...]:
    clock = _clock()
    client = _client(server, clock)

    async def ask(example: LabelledExample, scheduled: float) -> RequestSample:
        return await client.chat(example, example.text, scheduled, **ANSWER)

    try:
        return await closed_loop(prompts, users, ask, clock)
    finally:
        await client.close()


def _kill_engine(server: RunningServer) -> None:
    """SIGKILL the engine, and wait until another is ready. Raises ServerFailed."""
    if server.pid is None or kill_engine(server.pid) is None:
        raise ServerFailed("the server has no engine process of its own to kill")
    deadline = time.perf_counter() + BACK_S
    while time.perf_counter() < deadline:
        health = get_local(f"{server.base_url.removesuffix('/v1')}/health")
        if health.status_code == 200 and health.json().get("restarts"):
            return
        time.sleep(0.05)
    raise ServerFailed(f"the engine was not ready again {BACK_S:g} s after SIGKILL")


def _gauges(server: RunningServer) -> dict[str, float]:
    return read_counters(get_local(f"{server.base_url.removesuffix('/v1')}/metrics").text, PREFIX_GAUGES)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    return table


def _talk_table(run: PrefixRun) -> Table:
    turns = [f"turn {turn}" for turn in range(1, run.turns + 1)]
    title = f"Conversations: median TTFT in ms; SIGKILL after turn {run.kill_after}"
    after = f"after turn {run.kill_after}"
    table = _table(title, "", *turns, after, "worst", "kept", "ready after")
    for name in dict.fromkeys(made.name for made in run.talks):
        passes = [made for made in run.talks if made.name == name]
        late = [s for made in passes for s in made.samples if person_and_turn(s.id)[1] > run.kill_after]
        each = [first_token_ms(run, name, turn - 1, turn) for turn in range(1, run.turns + 1)]
        later = first_token_ms(run, name, run.kill_after)
        ready = [made.ready_s for made in passes if made.ready_s is not None]
        cells = [f"{median(ms):.0f}" if ms else "–" for ms in (*each, later)]
        cells += [f"{max(later):.0f}" if later else "–", f"{kept_share(late):.0%}"]
        table.add_row(name, *cells, f"{median(ready):.1f} s" if ready else "")
    return table


def _round_table(run: PrefixRun) -> Table:
    table = _table(
        f"{len(run.rounds[0].rounds[0])} few-shot prompts, one at a time, asked twice",
        *("server", "first", "second", "ratio", "kept", "in memory", "on disk"),
    )
    for made in run.rounds:
        first, second = made.seconds(0), made.seconds(1)
        held = mebibytes(made.gauges[-1].get(SNAPSHOTS, 0.0))
        disk = mebibytes(made.disk_bytes) if made.disk_bytes else ""
        times = (f"{first:.1f} s", f"{second:.1f} s", f"{first / second:.1f}")
        table.add_row(made.flags, *times, f"{kept_share(made.rounds[1]):.0%}", held, disk)
    return table


def _memory_table(run: PrefixRun) -> Table:
    table = _table(f"Memory of all processes, {USERS} clients", "when", "requests", "in all", "of it snapshots")
    for point in run.memory:
        held = mebibytes(point.snapshot_bytes)
        table.add_row(point.when, f"{point.requests:,}", mebibytes(point.tree_bytes), held)
    return table


def _heading(run: PrefixRun) -> Iterator[str]:
    machine = run.machine
    yield f"{machine.cpu}, {machine.logical_cores} logical cores, {machine.system}; {run.started_at}"
    yield f"{run.model}, {run.quantization}, {run.threads} threads; {run.workload}"
    if run.talks:
        yield f"llama-server: {run.peer}"
        yield (
            f"conversations: {run.people} people, {run.turns} turns each of about 600 tokens, one request at a time; "
            f"repetitions: {run.repetitions}; kept: tokens of prompts that were not computed again"
        )
    tokens = [s.prompt_tokens for made in run.rounds for s in made.rounds[0] if s.prompt_tokens]
    if tokens:
        yield f"few-shot prompts: {median(tokens):.0f} tokens, answers of at most {ANSWER['max_tokens']}"
    if run.memory:
        yield "memory is proportional: other processes that have the model's file open take a part of it"
    if run.quick:
        yield "--quick: few requests; this checks that everything works and measures nothing well"
