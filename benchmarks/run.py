"""The order of a benchmark, and nothing else: start, warm up, measure each level, save; then the next arm.

The file is written after every level, so that an interrupted run keeps what it measured.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .arms import ArmPlan
from .client import OpenAiClient
from .errors import ServerFailed
from .load import closed_loop
from .machine import describe, load_average
from .record import Arm, Level, Run, Sample, Workload, save_run
from .workload import Draw, Example

Progress = Callable[[str, int, int], None]
Keep = Callable[[Arm], None]
Ask = Callable[[Example, float], Awaitable[Sample]]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything a run needs: arms in order, which examples each concurrency gets, and where the file goes."""

    arms: Sequence[ArmPlan]
    workload: Workload
    drawn: Draw
    out: Path


def run(plan: RunPlan, progress: Progress) -> Run:
    """Run every arm and return the record, which is also on disk. `progress(what, done, total)` hears each answer.

    Raises ServerFailed when a server does not start or fails its warm-up; what was measured before is on disk.
    """
    record = Run(started_at=_now(), machine=describe(), workload=plan.workload)
    for arm_plan in plan.arms:
        progress(f"{arm_plan.facts.name}: starting {arm_plan.facts.model}", 0, 1)
        earlier = record.arms

        def keep(arm: Arm, earlier: tuple[Arm, ...] = earlier) -> None:
            nonlocal record
            record = record.model_copy(update={"arms": (*earlier, arm)})
            save_run(plan.out, record)

        with arm_plan.start() as server:
            arm = arm_plan.facts.model_copy(update={"start_s": server.start_s or None})
            asyncio.run(_Measurement(arm_plan, server.base_url, keep, progress).run(arm, plan.drawn))
    record = record.model_copy(update={"finished_at": _now()})
    save_run(plan.out, record)
    return record


class _Measurement:
    """One arm against its running server. Its clock starts again with each level."""

    def __init__(self, plan: ArmPlan, base_url: str, keep: Keep, progress: Progress) -> None:
        self._plan = plan
        self._keep = keep
        self._progress = progress
        self._origin = time.perf_counter()
        self._client = OpenAiClient(base_url, plan.facts.model, key=plan.key, body=plan.body, clock=self._clock)

    def _clock(self) -> float:
        return time.perf_counter() - self._origin

    async def run(self, arm: Arm, drawn: Draw) -> None:
        try:
            warmup = await closed_loop(drawn.warmup, 1, self._ask, self._clock)
            if warmup and all(sample.error for sample in warmup):
                raise ServerFailed(f"{arm.name}: {arm.model!r} failed its warm-up: {warmup[0].error}")
            arm = arm.model_copy(update={"warmup": warmup})
            for concurrency, examples in drawn.levels.items():
                level = await self._level(arm.name, concurrency, examples)
                arm = arm.model_copy(update={"levels": (*arm.levels, level)})
                self._keep(arm)
        finally:
            await self._client.close()

    async def _level(self, name: str, concurrency: int, examples: Sequence[Example]) -> Level:
        done = 0

        async def ask(example: Example, scheduled: float) -> Sample:
            nonlocal done
            sample = await self._ask(example, scheduled)
            done += 1
            self._progress(f"{name} ×{concurrency}", done, len(examples))
            return sample

        load_before = load_average()
        self._origin = time.perf_counter()
        samples = await closed_loop(examples, concurrency, ask, self._clock)
        return Level(concurrency=concurrency, load_before=load_before, samples=samples)

    async def _ask(self, example: Example, scheduled: float) -> Sample:
        send = self._client.chat if self._plan.chat else self._client.complete
        return await send(example, self._plan.prompt.render(example.text), scheduled, **self._plan.fields)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
