"""The loop that runs an engine in its process: a request that the engine cannot take harms no other."""

import logging
from queue import SimpleQueue

import pytest

from runtime.engine.engine import Engine
from runtime.requests import Failed, Request, SamplingParams
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
