"""Workers whose toy engine has a process of its own, for tests that kill it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.worker.process import ProcessHost
from runtime.worker.supervisor import EngineSupervisor, RestartPolicy

from .toy_engine import FakeRecipe

QUICK = RestartPolicy(pause_s=0.01)


@contextmanager
def processing(recipe: FakeRecipe, *, queue: int = 8, policy: RestartPolicy = QUICK) -> Iterator[EngineSupervisor]:
    """A supervisor whose engine has a process; none of its processes is left afterwards."""
    host = ProcessHost(recipe, "toy")
    try:
        host.await_loaded()
    except BaseException:
        host.close()
        raise
    supervisor = EngineSupervisor(host, queue=queue, slots=recipe.slots, policy=policy)
    supervisor.start()
    try:
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
