"""An engine in a thread of this process, where tests reach the toy model behind it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

from runtime.llama.interface import ModelInfo
from runtime.worker.child import EngineLoop
from runtime.worker.messages import EngineLike, Order, Ready, Stepped
from runtime.worker.process import EngineProcess, EngineRun
from runtime.worker.supervisor import EngineSupervisor, RestartPolicy, SupervisorLimits

from .fakes import fake_info

# An engine in a thread has no second life.
NO_RESTART = RestartPolicy(deaths=1)


class EngineThread(EngineProcess):
    """Runs `engine` once, in the supervisor's thread: in place of an `EngineProcess`, of which it inherits nothing."""

    def __init__(self, engine: EngineLike, info: ModelInfo | None = None) -> None:
        self.name = "toy"
        self._run = _ThreadRun(engine, info or fake_info())

    def launch(self) -> EngineRun:
        return self._run


class _ThreadRun(EngineRun):
    def __init__(self, engine: EngineLike, info: ModelInfo) -> None:
        self._engine = engine
        self._info = info
        self._inbox: SimpleQueue[Order | None] = SimpleQueue()
        self._loop = EngineLoop(engine, self._inbox)

    def await_ready(self) -> Ready:
        return Ready(self._info, self._engine.stats())

    def send(self, messages: Sequence[Order]) -> None:
        for message in messages:
            self._inbox.put(message)

    def receive(self) -> Stepped | None:
        return self._loop.turn()

    def stop(self) -> None:
        self._inbox.put(None)

    def close(self) -> None:
        self._engine.close()


def supervise(engine: EngineLike, *, slots: int = 4, queue: int = 8) -> EngineSupervisor:
    """A supervisor of `engine`, not started."""
    return EngineSupervisor(
        EngineThread(engine), limits=SupervisorLimits(slots=slots, queue=queue, restarts=NO_RESTART)
    )


@contextmanager
def supervising(engine: EngineLike, *, slots: int = 4, queue: int = 8) -> Iterator[EngineSupervisor]:
    """A supervisor of `engine` that takes requests until the block ends."""
    supervisor = supervise(engine, slots=slots, queue=queue)
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
