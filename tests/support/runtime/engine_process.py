"""Supervisors of toy engines in processes of their own, for tests that kill them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.worker.process import EngineProcess
from runtime.worker.supervisor import EngineSupervisor, RestartPolicy, SupervisorLimits

from .toy_engine import FakeRecipe

QUICK = RestartPolicy(pause_s=0.01)


@contextmanager
def processing(
    recipe: FakeRecipe, *, restarts: RestartPolicy = QUICK, cancel_s: float = 10.0, **process: Any
) -> Iterator[EngineSupervisor]:
    """A supervisor of engine processes, none of which is left afterwards. `process` holds options of EngineProcess."""
    limits = SupervisorLimits(slots=recipe.slots, queue=8, restarts=restarts, cancel_s=cancel_s)
    supervisor = EngineSupervisor(EngineProcess(recipe, "toy", **process), limits=limits)
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()
        assert not [pid for pid in recipe.pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
