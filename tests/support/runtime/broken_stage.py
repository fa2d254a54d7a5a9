"""A stage on which something breaks: a victim and its neighbours call a toy engine over real sockets.

The engine waits until all calls are accepted; then the trouble comes at a known step of the victim. Whatever the
trouble was, each accepted request ends once, on the wire too; the neighbours get the answers they get alone; and no
cell or sequence stays held.
"""

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import numpy as np
import pytest

from runtime.config import RuntimeConfig
from runtime.decoding.grammar import Grammars
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.interface import Batch
from runtime.requests import Failed

from . import serving as serving_module
from .connection import answered, asked
from .fakes import FakeLlama
from .observed import Observed
from .serving import PATIENCE_S, Running, serving, wait_until

# In every prompt of a victim, and nowhere else: tells which steps work for it.
MARK = "~"


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of work: a call, which becomes `n` requests."""

    path: str
    body: dict[str, Any]
    n: int = 1


NEIGHBOURS = (
    Kind(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "I live next door."}],
            "temperature": 0,
            "max_tokens": 40,
            "stream": True,
        },
    ),
    Kind("/v1/embeddings", {"input": ["next door"], "encoding_format": "base64"}),
)


@dataclass(frozen=True)
class Heard:
    """What a client was told: an answer, without what differs from call to call, or an error's code."""

    status: int
    answer: Any = None
    error: str | None = None

    def like(self, other: "Heard") -> bool:
        """Whether they say the same. A text that is embedded in other pieces has its rows summed in another order."""
        if isinstance(self.answer, np.ndarray) and isinstance(other.answer, np.ndarray):
            return bool(np.allclose(self.answer, other.answer, atol=1e-5))
        return self == other


def heard(connection: socket.socket) -> Heard:
    """Read a response to its end."""
    status, kind, content = answered(connection)
    if kind.startswith("text/event-stream"):
        return _heard_stream([block.split("data: ", 1)[1] for block in content.decode().split("\n\n") if block])
    body = json.loads(content)
    if "error" in body:
        return Heard(status, error=body["error"]["code"])
    if "data" in body:
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), np.float32) for item in body["data"]]
        return Heard(status, np.stack(rows))
    return Heard(status, body["answers"] if "answers" in body else body["choices"])


def _heard_stream(blocks: list[str]) -> Heard:
    """A stream has one event that says how it ended, and it is the last."""
    events = [json.loads(block) for block in blocks if block != "[DONE]"]
    if "type" in events[0]:
        ends = ("response.completed", "response.incomplete", "response.failed")
        assert [event["type"] in ends for event in events] == [False] * (len(events) - 1) + [True]
        response = events[-1]["response"]
        if response["status"] == "failed":
            return Heard(200, error=response["error"]["code"])
        return Heard(200, (response["output"][0]["content"], response["status"]))
    errors = [event["error"]["code"] for event in events if "error" in event]
    assert len(errors) + blocks.count("[DONE]") == 1
    if errors:
        assert "error" in events[-1]
        return Heard(200, error=errors[0])
    choices = [choice for event in events for choice in event["choices"]]
    [reason] = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return Heard(200, ("".join(choice["delta"].get("content") or "" for choice in choices), reason))


Trouble = Callable[["Scene", int], Exception | None]
"""What happens in the engine's thread before a step, of that number; the error that the step then ends in."""


class Scene:
    """A server on whose engine trouble waits.

    It may be played on again. No prompt is kept, so the same call takes the same steps each time.
    """

    def __init__(self, **llama: Any) -> None:
        self.llama = FakeLlama(n_ctx=4096, n_batch=64, **llama)
        self.llama.on_decode, self.llama.on_embed = self._before_decode, self._before_embed
        self.victims: list[str] = []
        self.connection: socket.socket
        self.running: Running
        self.observed: Observed
        self._curtain = threading.Event()
        self._stands = threading.Event()
        self._engines: list[Engine] = []
        self.arm(None, 0)

    def arm(self, trouble: Trouble | None, nth: int, *, lasting: bool = False) -> None:
        """`trouble` comes at the `nth` step for the next victim; if `lasting` at each from there on."""
        self._trouble, self._nth, self._lasting = trouble, nth, lasting
        self._n_marked = 0

    @contextmanager
    def on(self, slots: int = 4) -> Iterator[Self]:
        """Serve until the block ends."""

        def noting(llama: FakeLlama, options: EngineOptions, grammars: Grammars) -> Engine:
            options = replace(options, keep_prefixes=False)
            self._engines.append(Engine(llama, options, grammars))
            return self._engines[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving_module, "Engine", noting)
            with serving(self.llama, RuntimeConfig(slots=slots, queue=8, drain_seconds=0)) as self.running:
                self.observed = Observed(self.running.supervisor)
                yield self

    @contextmanager
    def curtain(self) -> Iterator[Callable[[], None]]:
        """The engine waits before its next step, until what this gives is called or the block ends."""
        self._curtain.clear()
        self._stands.clear()
        try:
            yield self._curtain.set
        finally:
            self._curtain.set()

    def ask(self, stack: ExitStack, kind: Kind, *, accepted: bool = True, **options: Any) -> socket.socket:
        """Send a call; if it is to be `accepted`, wait until it is, and until the engine stands."""
        assert self.running.supervisor.state == "ready"
        n_before = len(self.observed.events)
        connection = stack.enter_context(asked(self.running.url, kind.path, kind.body, **options))
        if accepted:
            wait_until(lambda: len(self.observed.events) == n_before + kind.n)
            # In the step of the first who asked: who is in the next ones must not depend on how fast the others were.
            assert self._stands.wait(PATIENCE_S)
        self.victims = list(self.observed.events)[n_before:]
        return connection

    @property
    def at_work(self) -> tuple[int, int]:
        """Accepted requests that have not ended, and calls whose answer is not out."""
        return self.running.supervisor.live, self.running.pool.find(None)[0].leases

    def require_rest(self) -> None:
        """Nothing runs or waits, each accepted request has ended once, and what is held is held by idle residents."""
        wait_until(lambda: self.at_work == (0, 0))
        [engine] = self._engines
        stats = self.running.supervisor.stats
        wait_until(lambda: (stats().running, stats().waiting) == (0, 0))
        wait_until(lambda: all(map(self.observed.ends, self.observed.events)))  # they reach the loop a moment later
        for request_id, events in self.observed.events.items():
            assert self.observed.ends(request_id) == events[-1:], "one terminal event, and nothing after it"
        assert not engine.has_work
        if engine.failure is None:
            _require_idle(engine, self.llama)

    def _before_decode(self, number: int, batch: Batch) -> None:
        held = self.llama.sequences
        resident = [token for seq_id in set(batch.seq_ids.tolist()) for token in held.get(seq_id, ())]
        if error := self._before((*resident, *batch.tokens), number):
            self.llama.fail_at[number] = error

    def _before_embed(self, batch: Batch) -> None:
        if error := self._before(batch.tokens, -1):
            raise error

    def _before(self, tokens: Iterable[int], number: int) -> Exception | None:
        self._stands.set()
        assert self._curtain.wait(PATIENCE_S)
        if self._trouble is None or ord(MARK) not in tokens:
            return None
        place, self._n_marked = self._n_marked, self._n_marked + 1
        due = place == self._nth or (self._lasting and place > self._nth)
        return self._trouble(self, number) if due else None


def _require_idle(engine: Engine, llama: FakeLlama) -> None:
    """Nothing runs; the engine's books agree with the cells that the fake holds."""
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    engine.check({seq_id: len(tokens) for seq_id, tokens in llama.sequences.items()})
    assert stats.kv_cells_used == llama.used_cells


@cache
def alone(kind: Kind, script: str | None = None) -> Heard:
    """What a call is told that is alone on a server."""
    with Scene(script=script).on() as scene, scene.curtain() as rise, ExitStack() as stack:
        connection = scene.ask(stack, kind)
        rise()
        told = heard(connection)
    assert (told.status, told.error) == (200, None)
    assert kind not in NEIGHBOURS or MARK not in str(told.answer)
    return told


@dataclass(frozen=True)
class Outcome:
    """What the victim's client was told, if it stayed; and for each of its requests the error that ended it, if any."""

    told: Heard | None
    errors: list[Exception | None]


def play(
    scene: Scene,
    kind: Kind,
    *,
    accepted: bool = True,
    before: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
    stays: bool = True,
    unharmed: bool = True,
    buffer_bytes: int = 0,
) -> Outcome:
    """Everyone asks, the curtain rises, the neighbours are heard, and then the victim.

    `before` (the curtain) and `between` (neighbours and victim) are called at those moments. `accepted`: the victim
    reaches the engine. `stays`: its client reads the answer. `unharmed`: the neighbours are told all.
    """
    script = scene.llama.script if isinstance(scene.llama.script, str) else None
    expected = {neighbour: alone(neighbour, script) for neighbour in NEIGHBOURS}
    scene.observed.events.clear()
    with scene.curtain() as rise, ExitStack() as stack:
        neighbours = [(scene.ask(stack, neighbour), neighbour) for neighbour in NEIGHBOURS]
        scene.connection = scene.ask(stack, kind, accepted=accepted, buffer_bytes=buffer_bytes)
        told = None if accepted else heard(scene.connection)
        before()
        rise()
        for connection, neighbour in neighbours:
            told_neighbour = heard(connection)
            assert told_neighbour.like(expected[neighbour]) or (told_neighbour.error and not unharmed)
        between()
        if accepted and stays:
            told = heard(scene.connection)
        scene.require_rest()
        assert len(scene.observed.events) == len(NEIGHBOURS) + (kind.n if accepted else 0)
        ends = [scene.observed.ends(victim)[0] for victim in scene.victims]
    return Outcome(told, [end.error if isinstance(end, Failed) else None for end in ends])
