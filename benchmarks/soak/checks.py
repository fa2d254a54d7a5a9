"""The records of a soak, the watch on its server's processes, and the checks: each computed from the record alone."""

import os
import signal
from collections import Counter
from collections.abc import Sequence

import numpy as np

from benchmarks.load.servers import children, resident_bytes
from benchmarks.record import MachineRecord
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


class MemorySample(Record):
    """Resident bytes of the server's process and of its engine's (0 without one) at one time."""

    at_s: float
    server_bytes: int
    engine_pid: int | None
    engine_bytes: int


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


def sample_memory(pid: int, at_s: float) -> MemorySample:
    """Measure the memory of server `pid` and of its engine."""
    engine = engine_of(pid)
    used = resident_bytes(engine) if engine is not None else 0
    return MemorySample(at_s=at_s, server_bytes=resident_bytes(pid), engine_pid=engine, engine_bytes=used)


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
    different = sorted(set(run.canaries))
    found = f"{len(run.canaries)} answers, {len(different)} different: {', '.join(map(repr, different[:3]))}"
    return SoakCheck(name="a fixed request keeps its answer", found=found, passed=len(different) == 1)


def _memory(run: SoakRun) -> tuple[SoakCheck, ...]:
    settle = min(SETTLE_S, SETTLE_SHARE * run.load_s)
    settled = [sample for sample in run.memory if sample.at_s >= settle and sample.at_s <= run.load_s]
    checks = [_flat("server", [(s.at_s, s.server_bytes) for s in settled])]
    engines = [sample for sample in run.memory if sample.engine_pid is not None]
    if engines:
        last = engines[-1].engine_pid
        born = next(sample.at_s for sample in engines if sample.engine_pid == last)
        lived = [(s.at_s, s.engine_bytes) for s in settled if s.engine_pid == last and s.at_s >= born + settle]
        checks.append(_flat("engine (since its last start)", lived))
    return tuple(checks)


def _flat(who: str, points: Sequence[tuple[float, int]]) -> SoakCheck:
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
