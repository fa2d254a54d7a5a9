"""What the supervisor and the engine say to each other: the same nouns whether a pipe lies between them or not."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

from .errors import EngineError
from .llama_protocol import ModelInfo
from .sequence import EngineStats, Event, Work


class EngineLike(Protocol):
    """What its owner needs of an engine. Nothing else is called, and all but `prepare` from one thread only."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    @property
    def failure(self) -> Exception | None:
        """The fatal error that ended the engine, if one did."""

    def prepare(self, request: Work) -> None:
        """Do for a request what would hold up the others in `add`. Any thread."""

    def add(self, request: Work) -> None:
        """Take a request in."""

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request; its terminal event if it was live."""

    def step(self) -> list[Event]:
        """Compute one step."""

    def stats(self) -> EngineStats:
        """What the engine holds."""

    def close(self) -> None:
        """Free the model."""


class EngineRecipe(Protocol):
    """All that an engine is made of. Frozen and picklable: it travels to the process that builds the engine."""

    def build(self) -> tuple[EngineLike, ModelInfo]:
        """Load the model. Raises LoadFailed."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first word to an engine's process: what to load, and the level of each logger whose lines are wanted."""

    recipe: EngineRecipe
    log_levels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Add:
    """To the engine: answer this."""

    request: Work


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the engine: end these requests with `error`, those that are still live."""

    request_ids: tuple[str, ...]
    error: Exception


@dataclass(frozen=True, slots=True)
class Ready:
    """From the engine: the model is loaded, requests may come."""

    info: ModelInfo
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Stepped:
    """From the engine: what came of one step, and what the engine holds after it."""

    events: tuple[Event, ...]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Broke:
    """From the engine, its last word: it could not be built (LoadFailed), or cannot go on."""

    error: EngineError


@dataclass(frozen=True, slots=True)
class Logged:
    """From the engine: a line for the log."""

    logger: str
    level: int
    text: str


ToEngine = Add | Cancel
FromEngine = Ready | Stepped | Broke | Logged

_COUNTERS = tuple(
    field.name for field in fields(EngineStats) if field.name.endswith("_total") and field.name != "kv_cells_total"
)


def summed(before: EngineStats, now: EngineStats) -> EngineStats:
    """What an engine holds `now`, with the totals of the engines that ran before it."""
    return replace(now, **{name: getattr(before, name) + getattr(now, name) for name in _COUNTERS})
