"""Where an engine runs: the seam between the supervisor and its engine, and the host that keeps it in a thread.

A host brings engines to life, one after the other. The supervisor's thread reads a life until it is over.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from .sequence import EngineStats
from .worker_loop import EngineLoop, Inbox
from .worker_protocol import EngineLike, Stepped, ToEngine


class Life(ABC):
    """One engine, from its start to its end."""

    @abstractmethod
    def await_ready(self) -> EngineStats:
        """Wait until the model is loaded. Raises LoadFailed, or what `receive` raises."""

    @abstractmethod
    def send(self, messages: Sequence[ToEngine]) -> None:
        """Leave messages for the engine, from any thread. Never waits; lost if the engine is gone."""

    @abstractmethod
    def receive(self) -> Stepped | None:
        """Wait for what comes of the next step. None once `stop` was called; raises EngineError if the engine ended."""

    @abstractmethod
    def stop(self) -> None:
        """End the engine, from any thread; `receive` then returns. Harmless if it has ended."""

    @abstractmethod
    def close(self) -> None:
        """Free what is left, once nobody is in `receive` any more. Closing twice is harmless."""


class EngineHost(ABC):
    """Brings engines to life."""

    @property
    @abstractmethod
    def relaunches(self) -> bool:
        """Whether another engine can follow one that ended."""

    @abstractmethod
    def launch(self) -> Life:
        """Begin a life. Raises OSError if the machine has no room for it."""


class ThreadHost(EngineHost):
    """Runs one engine in the thread that calls `receive`. What kills it kills the whole process."""

    relaunches = False

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine

    def launch(self) -> Life:
        """The engine's only life."""
        return _ThreadLife(self._engine)


class _ThreadLife(Life):
    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._inbox = Inbox()
        self._loop = EngineLoop(engine, self._inbox)

    def await_ready(self) -> EngineStats:
        return self._engine.stats()

    def send(self, messages: Sequence[ToEngine]) -> None:
        self._inbox.put(messages)

    def receive(self) -> Stepped | None:
        return self._loop.turn()

    def stop(self) -> None:
        self._inbox.close()

    def close(self) -> None:
        self._engine.close()
