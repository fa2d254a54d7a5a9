"""The loop that runs an engine in its process: a request that the engine cannot take harms no other, and it rests."""

import logging
from queue import SimpleQueue

import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.requests import Failed, Request, SamplingParams
from runtime.worker import child
from runtime.worker.child import EngineLoop
from runtime.worker.messages import Add, Order
from tests.support.runtime.fakes import FakeLlama


class BrokenEngine(Engine):
    def add(self, request: object) -> None:
        raise ZeroDivisionError("a bug of ours")


@pytest.mark.parametrize(("kind", "is_logged"), [(Engine, False), (BrokenEngine, True)])
def test_only_a_fault_that_is_not_the_clients_is_logged(
    kind: type[Engine], is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = SimpleQueue[Order | None]()
    inbox.put(Add(Request("a", tuple(range(600)), SamplingParams(5, 0))))  # longer than the context of 512 tokens
    with caplog.at_level(logging.INFO, "deskside.worker"):
        stepped = EngineLoop(kind(FakeLlama(n_ctx=512)), inbox).turn()
    assert stepped is not None
    (failed,) = stepped.events
    assert isinstance(failed, Failed)
    assert ("Traceback" in caplog.text) is is_logged


def test_the_figures_after_a_rest_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "REST_SECONDS", 0.0)
    inbox = SimpleQueue[Order | None]()
    inbox.put(Add(Request("a", tuple(range(100)), SamplingParams(2, 0))))
    engine = Engine(FakeLlama(), EngineOptions(snapshot_bytes=1 << 20))
    loop = EngineLoop(engine, inbox)
    turns = [loop.turn()]
    while engine.has_work:
        turns.append(loop.turn())
    turns.append(loop.turn())
    worked, rested = (turn.stats for turn in turns[-2:] if turn is not None)
    assert (worked.snapshot_bytes, worked.kv_cells_used) == (0, 100)
    assert (rested.snapshot_bytes > 0, rested.kv_cells_used) == (True, 0)
    inbox.put(None)
    assert loop.turn() is None
