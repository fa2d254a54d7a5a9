"""The records of a soak and of `bench prefixes`, the watch on a server's processes, and the checks.

Each check is computed from the record alone.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Literal

import numpy as np

from benchmarks.load.servers import children, resident_bytes
from benchmarks.load.workload import person_and_turn
from benchmarks.record import MachineRecord, RequestSample
from models.common.machine import mebibytes
from models.common.record import Record

from .client import RequestOutcome

# An engine holds more than this; a bare interpreter (a resource tracker) does not.
ENGINE_BYTES = 64 << 20
# Memory is judged after this time, or this share of a shorter soak.
SETTLE_S = 300.0
SETTLE_SHARE = 1 / 6
GROWTH_BYTES = 32 << 20
GROWTH_SHARE = 0.05
IDLE_SHARE = 0.25
RECOVERY_S = 30.0
LEAST_SAMPLES = 6
# Conversations of `bench prefixes`: what happens to the server.
OURS, ENGINE_KILLED, SERVER_KILLED, THEIRS = "deskside", "engine killed", "server killed", "llama-server"
TIMES_AS_FAST = 10.0
PROMPTS_GROWTH_BYTES = 16 << 20
ON_THE_WAY, AT_THE_END = "on the way", "at the end"
SNAPSHOTS, RESTORED = "deskside_snapshot_bytes", "deskside_snapshots_restored_total"
LOADED = "deskside_disk_prefixes_loaded_total"
PREFIX_GAUGES = (SNAPSHOTS, RESTORED, LOADED, "deskside_disk_prefixes_written_total")


class MemorySample(Record):
    """Resident bytes of the server's process and of its engine's (0 without one), the engine's with its snapshots."""

    at_s: float
    server_bytes: int
    engine_pid: int | None
    engine_bytes: int
    snapshot_bytes: float = 0.0

    @property
    def rest_bytes(self) -> float:
        """The engine's memory without the snapshots: those fill up to a bound of their own after every start."""
        return self.engine_bytes - self.snapshot_bytes


class EngineKill(Record):
    """A SIGKILL of the engine: time, process, and seconds until /health was ready again (None: never)."""

    at_s: float
    pid: int
    ready_after_s: float | None


class SoakRun(Record):
    """One soak. `gauges`: the server's own after the load; `canaries`: the answers to one fixed request."""

    started_at: str
    machine: MachineRecord
    model: str
    minutes: float
    seed: int
    clients: int
    capacity: int
    wanted_kills: int
    load_s: float
    outcomes: tuple[RequestOutcome, ...]
    kills: tuple[EngineKill, ...]
    memory: tuple[MemorySample, ...]
    canaries: tuple[str, ...]
    gauges: dict[str, float]
    ready_at_end: bool


class TalkPass(Record):
    """Everybody's conversation with one server. `ready_s`: from the kill, if any, until it was ready again."""

    name: str
    repetition: int
    ready_s: float | None = None
    samples: tuple[RequestSample, ...]


class RoundsPass(Record):
    """The same prompts asked in two rounds, with the server's own gauges after each, and the bytes of its folder."""

    flags: str
    rounds: tuple[tuple[RequestSample, ...], ...]
    gauges: tuple[dict[str, float], ...]
    disk_bytes: int

    def seconds(self, number: int) -> float:
        """The wall time of a round."""
        samples = self.rounds[number]
        return max(s.finished_s for s in samples) - min(s.scheduled_s for s in samples)


class MemoryPoint(Record):
    """The memory of a server and its engine after so many requests (proportional), and its snapshots' part of it."""

    when: str
    requests: int
    tree_bytes: int
    snapshot_bytes: float


class PrefixRun(Record):
    """One run of `deskside bench prefixes`; `peer` is llama-server's profile, or why it is missing."""

    schema_version: Literal[1] = 1
    started_at: str
    finished_at: str | None = None
    machine: MachineRecord
    model: str
    quantization: str
    sha256: str
    threads: int
    workload: str
    people: int
    turns: int
    kill_after: int
    repetitions: int
    seed: int
    quick: bool
    peer: str
    talks: tuple[TalkPass, ...] = ()
    rounds: tuple[RoundsPass, ...] = ()
    memory: tuple[MemoryPoint, ...] = ()
    short: tuple[RequestSample, ...] = ()

    @property
    def failed(self) -> int:
        """The requests without a whole answer."""
        everything = [*(made.samples for made in self.talks), *(r for made in self.rounds for r in made.rounds)]
        return sum(sample.error is not None for samples in (*everything, self.short) for sample in samples)


class SoakCheck(Record):
    """The result of one check; `passed` is None when it could not be checked here, and `found` says why."""

    name: str
    found: str
    passed: bool | None


def engine_of(pid: int) -> int | None:
    """The engine's process: the largest child of server `pid` with ENGINE_BYTES or more, or None."""
    sizes = {child: resident_bytes(child) for child in children(pid)}
    engine = max(sizes, key=lambda child: sizes[child], default=None)
    return engine if engine is not None and sizes[engine] >= ENGINE_BYTES else None


def sample_memory(pid: int, at_s: float, snapshot_bytes: float = 0.0) -> MemorySample:
    """Measure the memory of server `pid` and of its engine, which says that it holds `snapshot_bytes`."""
    engine = engine_of(pid)
    used = resident_bytes(engine) if engine is not None else 0
    return MemorySample(
        at_s=at_s, server_bytes=resident_bytes(pid), engine_pid=engine, engine_bytes=used, snapshot_bytes=snapshot_bytes
    )


def kill_engine(pid: int) -> int | None:
    """SIGKILL the engine of server `pid`; its pid, or None when the server has no engine process."""
    engine = engine_of(pid)
    if engine is not None:
        os.kill(engine, signal.SIGKILL)
    return engine


def check(run: SoakRun) -> tuple[SoakCheck, ...]:
    """Run every check."""
    return (_terminal(run), _failures(run), _refusals(run), _canary(run), *_memory(run), _kills(run), *_end(run))


def _terminal(run: SoakRun) -> SoakCheck:
    broken = [outcome for outcome in run.outcomes if outcome.end == "broken"]
    counts = Counter(outcome.end for outcome in run.outcomes)
    found = f"{len(run.outcomes)} requests: " + ", ".join(f"{n} {end}" for end, n in sorted(counts.items()))
    if broken:
        found += f"; first: {broken[0].kind} at {broken[0].started_s:.0f} s: {broken[0].detail}"
    return SoakCheck(name="every request ended exactly once", found=found, passed=bool(run.outcomes) and not broken)


def _failures(run: SoakRun) -> SoakCheck:
    """An accepted request may fail only while the engine is killed or restarting."""
    failed = [outcome for outcome in run.outcomes if outcome.end == "failed"]
    stray = [outcome for outcome in failed if not any(_overlap(outcome, kill) for kill in run.kills)]
    found = f"{len(failed)} failed, {len(stray)} of them away from a kill"
    if stray:
        found += f"; first: {stray[0].kind} at {stray[0].started_s:.0f} s: {stray[0].detail}"
    return SoakCheck(name="requests fail only around a kill", found=found, passed=not stray)


def _overlap(outcome: RequestOutcome, kill: EngineKill) -> bool:
    return outcome.started_s <= kill.at_s + RECOVERY_S and outcome.ended_s >= kill.at_s


def _refusals(run: SoakRun) -> SoakCheck:
    refused = sum(outcome.end == "refused" for outcome in run.outcomes)
    found = f"{refused} refused with 429 by {run.clients} clients at a capacity of {run.capacity}"
    return SoakCheck(name="the overload was real: some requests met a full queue", found=found, passed=refused > 0)


def _canary(run: SoakRun) -> SoakCheck:
    distinct = sorted(set(run.canaries))
    same = "all the same" if len(distinct) == 1 else f"{len(distinct)} distinct"
    found = f"{len(run.canaries)} answers, {same}: {', '.join(map(repr, distinct[:3]))}"
    return SoakCheck(name="a fixed request keeps its answer", found=found, passed=len(distinct) == 1)


def _memory(run: SoakRun) -> tuple[SoakCheck, ...]:
    settle = min(SETTLE_S, SETTLE_SHARE * run.load_s)
    settled = [sample for sample in run.memory if sample.at_s >= settle and sample.at_s <= run.load_s]
    checks = [_flat("server", [(s.at_s, s.server_bytes) for s in settled])]
    engines = [sample for sample in run.memory if sample.engine_pid is not None]
    if engines:
        last = engines[-1].engine_pid
        born = next(sample.at_s for sample in engines if sample.engine_pid == last)
        lived = [s for s in settled if s.engine_pid == last and s.at_s >= born + settle]
        who = "engine (since its last start, snapshots left out)"
        line = _flat(who, [(s.at_s, s.rest_bytes) for s in lived])
        most = max((s.snapshot_bytes for s in lived), default=0.0)
        checks.append(line.model_copy(update={"found": f"{line.found}; snapshots at most {mebibytes(most)}"}))
    return tuple(checks)


def _flat(who: str, points: Sequence[tuple[float, float]]) -> SoakCheck:
    """Check that memory is flat: the linear fit grows by less than the larger of 32 MiB and 5 % of the mean."""
    name = f"resident memory of the {who} is flat"
    if len(points) < LEAST_SAMPLES:
        return SoakCheck(name=name, found=f"only {len(points)} samples after settling", passed=None)
    times, sizes = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    growth = float(np.polyfit(times, sizes, 1)[0] * (times[-1] - times[0]))
    limit = max(GROWTH_BYTES, GROWTH_SHARE * float(sizes.mean()))
    found = (
        f"{growth / 2**20:+.1f} MiB over {times[-1] - times[0]:.0f} s at a mean of {mebibytes(sizes.mean())} "
        f"(limit {mebibytes(limit)})"
    )
    return SoakCheck(name=name, found=found, passed=growth < limit)


def _kills(run: SoakRun) -> SoakCheck:
    name = "the engine comes back after kill -9"
    if not run.kills and run.wanted_kills:
        found = "the server has no engine process of its own (or this system no /proc): nothing was killed"
        return SoakCheck(name=name, found=found, passed=None)
    times = ["never" if kill.ready_after_s is None else f"{kill.ready_after_s:.1f} s" for kill in run.kills]
    back = all(kill.ready_after_s is not None for kill in run.kills) and len(run.kills) == run.wanted_kills
    found = f"{len(run.kills)} of {run.wanted_kills} kills, ready after {', '.join(times) or '–'}"
    return SoakCheck(name=name, found=found, passed=back)


def _end(run: SoakRun) -> tuple[SoakCheck, ...]:
    gauges = run.gauges
    busy = {name: gauges.get(f"deskside_{name}") for name in ("live", "running", "waiting")}
    used, total = gauges.get("deskside_kv_cells_used"), gauges.get("deskside_kv_cells_total")
    shown = ", ".join(f"{name} {'unknown' if value is None else f'{value:g}'}" for name, value in busy.items())
    idle = "unknown" if used is None or not total else f"{used:g} of {total:g} cells"
    return (
        SoakCheck(name="nothing is left running or waiting", found=shown, passed=set(busy.values()) == {0.0}),
        SoakCheck(
            name="KV cells are free but for idle prefixes (at most a quarter)",
            found=idle,
            passed=used is not None and total is not None and used <= IDLE_SHARE * total,
        ),
        SoakCheck(name="the server is ready at the end", found=str(run.ready_at_end), passed=run.ready_at_end),
    )


def bars(run: PrefixRun) -> tuple[SoakCheck, ...]:
    """Judge every bar."""
    after = run.kill_after
    talks = ((OURS, 1), (ENGINE_KILLED, after), (SERVER_KILLED, after)) if run.talks else ()
    rounds = (_round_bar(made) for made in run.rounds)
    return (*(_talk_bar(run, *row) for row in talks), *rounds, *_memory_bars(run))


def first_token_ms(run: PrefixRun, name: str, after: int, last: int | None = None) -> list[float]:
    """Times to the first token of the turns after turn `after`, up to turn `last`."""
    samples = [sample for made in run.talks if made.name == name for sample in made.samples]
    wanted = range(after + 1, (run.turns if last is None else last) + 1)
    return [
        1000 * (sample.deltas_s[0] - sample.scheduled_s)
        for sample in samples
        if sample.error is None and sample.deltas_s and person_and_turn(sample.id)[1] in wanted
    ]


def kept_share(samples: Sequence[RequestSample]) -> float:
    """The share of the prompts' tokens that was not computed again."""
    read = sum(sample.prompt_tokens or 0 for sample in samples)
    return sum(sample.cached_tokens or 0 for sample in samples) / read if read else 0.0


def _n_failed(samples: Sequence[RequestSample]) -> int:
    return sum(sample.error is not None for sample in samples)


def _talk_bar(run: PrefixRun, name: str, after: int) -> SoakCheck:
    ours, theirs = (first_token_ms(run, who, after) for who in (name, THEIRS))
    shown = f"Deskside, {name}" if name != OURS else "Deskside, no restart"
    wanted = f"{shown}: first token after turn {after} no later than llama-server's"
    if not ours or not theirs:
        return SoakCheck(name=wanted, found=run.peer if ours else "no answers", passed=None)
    found = ", ".join(f"{median(ms):.0f} ms (worst {max(ms):.0f})" for ms in (ours, theirs))
    failed = sum(_n_failed(made.samples) for made in run.talks if made.name == name)
    found += f"; {failed} failed" if failed else ""
    return SoakCheck(name=wanted, found=found, passed=median(ours) <= median(theirs) and not failed)


def _round_bar(made: RoundsPass) -> SoakCheck:
    ratio = made.seconds(0) / made.seconds(1)
    failed = sum(map(_n_failed, made.rounds))
    name = f"{made.flags}: second round of {len(made.rounds[0])} few-shot prompts ≥ {TIMES_AS_FAST:g} times as fast"
    restored, loaded = (made.gauges[1].get(name, 0.0) - made.gauges[0].get(name, 0.0) for name in (RESTORED, LOADED))
    found = f"{ratio:.1f} times; {kept_share(made.rounds[1]):.0%} of the tokens kept, "
    found += f"{restored:.0f} prefixes restored, {loaded:.0f} of them from disk"
    found += f"; {failed} failed" if failed else ""
    return SoakCheck(name=name, found=found, passed=ratio >= TIMES_AS_FAST and not failed)


def _memory_bars(run: PrefixRun) -> Iterator[SoakCheck]:
    points = {point.when: point for point in run.memory}
    if not {ON_THE_WAY, AT_THE_END} <= points.keys():
        return
    early, late = points[ON_THE_WAY], points[AT_THE_END]
    limit = max(PROMPTS_GROWTH_BYTES, int(GROWTH_SHARE * early.tree_bytes))
    growth = late.tree_bytes - early.tree_bytes
    snapshots = late.snapshot_bytes - early.snapshot_bytes
    span = f"memory from {early.requests:,} to {late.requests:,} different prompts grows by at most {mebibytes(limit)}"
    measured = early.tree_bytes > 0
    for name, grown in ((span, growth), (f"{span}, snapshots left out", growth - snapshots)):
        found = f"{grown / 2**20:+.1f} MiB" if measured else "this system reports no proportional memory"
        yield SoakCheck(name=name, found=found, passed=grown <= limit if measured else None)
