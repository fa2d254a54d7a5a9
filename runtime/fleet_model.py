"""One base model of the fleet, loaded or not, with all the names that are served from it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.gguf.header import GgufMeta
from models.store.store import StoredModel

from .errors import EngineError
from .llama_protocol import ModelInfo
from .memory import Need
from .served import ServedModel
from .served_names import Wanted

State = Literal["unloaded", "loading", "ready", "unloading", "failed"]


@dataclass
class Loaded:
    """An engine in memory: the base model as loaded, and each served name's view of it."""

    base: ServedModel
    views: Mapping[str, ServedModel]
    load_seconds: float = 0.0


@dataclass
class Host:
    """What is known of one base model. Only the fleet changes it, on its event loop.

    `leases` counts requests that use it or wait for it, `waiting` those that wait for it to be loaded. `refusal` says
    what the last load ended in, unless it is loaded; after a failure nothing is tried before `retry_at_s`. `info` is
    kept when the model is unloaded. Times are of the fleet's clock, in seconds.
    """

    stored: StoredModel
    wanted: tuple[Wanted, ...]
    need: Need
    meta: GgufMeta | None = None
    state: State = "unloaded"
    loaded: Loaded | None = None
    info: ModelInfo | None = None
    leases: int = 0
    waiting: int = 0
    last_used_s: float = 0.0
    loading: asyncio.Task[None] | None = None
    refusal: tuple[type[EngineError], str] | None = None
    retry_at_s: float = 0.0
    failures_in_a_row: int = 0
    loads: int = 0
    unloads: int = 0
    failures: int = 0

    @property
    def name(self) -> str:
        """The base model's own name."""
        return self.stored.name

    @property
    def adapters(self) -> dict[str, Path]:
        """Every adapter to load with it: its name -> its LoRA GGUF file."""
        return {name: path for wanted in self.wanted for name, path in wanted.adapters.items()}

    @property
    def broken(self) -> bool:
        """Whether it is loaded but its engine has stopped for good."""
        return self.loaded is not None and self.loaded.base.worker.state == "failed"

    @property
    def usable(self) -> bool:
        """Whether a request may have it right now."""
        return self.state == "ready" and not self.broken

    @property
    def idle(self) -> bool:
        """Whether it holds memory that nobody uses."""
        return self.loaded is not None and self.leases == 0

    @property
    def shown_state(self) -> State:
        """`state`, or `failed` when the engine has stopped without being asked to."""
        return "failed" if self.broken else self.state
