"""The engine in a process of its own, killed in every way: one terminal event for each request, and a new engine."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from runtime.errors import (
    Cancelled,
    DecodeFailed,
    EngineDied,
    EngineDown,
    EngineError,
    InvalidRequest,
    LoadFailed,
    ShuttingDown,
)
from runtime.requests import (
    Embedded,
    Event,
    Failed,
    Finished,
    Grammar,
    GrammarKind,
    Request,
    SamplingParams,
    Scored,
    TextDelta,
)
from runtime.worker.inflight import Stream
from runtime.worker.process import EngineProcess, cause_of_death
from runtime.worker.supervisor import EngineSupervisor, RestartPolicy, SupervisorLimits
from tests.support.runtime.engine_process import alive, processing
from tests.support.runtime.prefixes import files
from tests.support.runtime.serving import PATIENCE_S, wait_until
from tests.support.runtime.toy_engine import EXIT_CODE, FakeRecipe

LONG = "hello " * 100


def request(name: str, prompt: str = "abc", max_tokens: int = 5) -> Request:
    return Request(name, tuple(prompt.encode()), SamplingParams(max_tokens))


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work(), PATIENCE_S)

    asyncio.run(limited())


async def collect(stream: Stream) -> list[Event]:
    return [event async for event in stream]


def end(events: list[Event], name: str) -> Finished | Scored | Embedded | Failed:
    """The one terminal event of a request."""
    ends = [event for event in events if event.request_id == name and not isinstance(event, TextDelta)]
    assert len(ends) == 1
    assert not isinstance(ends[0], TextDelta)
    return ends[0]


def error(events: list[Event], name: str) -> Exception:
    last = end(events, name)
    assert isinstance(last, Failed)
    return last.error


def text(events: list[Event], name: str) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.request_id == name)


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


async def require_healthy(supervisor: EngineSupervisor) -> None:
    """The next engine answers, and holds nothing of what was before."""
    events = await collect(supervisor.submit(request("healthy")))
    assert isinstance(end(events, "healthy"), Finished)
    await until(lambda: supervisor.stats().running == 0)
    assert (supervisor.state, supervisor.live, supervisor.stats().waiting) == ("ready", 0, 0)


def test_answers_come_out_of_another_process(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        events = await collect(supervisor.submit(request("a"), request("b", max_tokens=2), request("c", "xyz")))
        assert [text(events, name) for name in "abc"] == ["hello", "he", "hello"]
        assert all(isinstance(end(events, name), Finished) for name in "abc")
        assert recipe.pids != [os.getpid()]
        assert supervisor.stats().generated_tokens_total == 12

    with processing(recipe) as supervisor:
        run(work)
        assert (supervisor.restarts, supervisor.last_cause) == (0, None)


def test_a_grammar_is_compiled_where_the_engine_is(tmp_path: Path) -> None:
    def choosing(name: str, kind: GrammarKind, source: str) -> Request:
        return Request(name, (97,), SamplingParams(9, grammar=Grammar(kind, source, "choice")))

    async def work() -> None:
        good = supervisor.submit(choosing("a", "choice", '["exmh-users"]'))
        bad = supervisor.submit(choosing("b", "regex", "("))
        assert text(await collect(good), "a") == "exmh-user"
        assert isinstance(error(await collect(bad), "b"), InvalidRequest)

    with processing(FakeRecipe(tmp_path)) as supervisor:
        run(work)
        assert supervisor.restarts == 0


def test_a_request_that_cannot_be_sent_fails(tmp_path: Path) -> None:
    """No valid request is like that; a fault of ours would end engines, as poison does."""

    async def work() -> None:
        odd = Request("odd", (97,), SamplingParams(5, logit_bias=MappingProxyType({1: 1.0})))
        failed, fine = supervisor.submit(odd), supervisor.submit(request("fine"))
        assert isinstance(error(await collect(failed), "odd"), EngineError)
        end(await collect(fine), "fine")
        await require_healthy(supervisor)

    with processing(FakeRecipe(tmp_path)) as supervisor:
        run(work)


def test_cancel_reaches_the_other_process(tmp_path: Path) -> None:
    async def work() -> None:
        stream = supervisor.submit(request("a", max_tokens=3000), request("b", max_tokens=3000))
        await stream.__anext__()
        stream.cancel()
        events = await collect(stream)
        assert isinstance(error(events, "a"), Cancelled)
        assert isinstance(error(events, "b"), Cancelled)
        await until(lambda: supervisor.stats().running == 0)
        assert supervisor.stats().generated_tokens_total < 6000
        await require_healthy(supervisor)

    with processing(FakeRecipe(tmp_path, script="hello " * 500)) as supervisor:
        run(work)


@pytest.mark.parametrize("order", ["K", "A", "X", "F", "H", "G", "M"])
def test_requests_without_a_delivered_event_are_answered_by_the_next_engine(tmp_path: Path, order: str) -> None:
    async def work() -> None:
        events = await collect(supervisor.submit(request("a", f"{order}bc"), request("b"), request("c")))
        assert [text(events, name) for name in "abc"] == ["hello"] * 3
        assert all(isinstance(end(events, name), Finished) for name in "abc")
        assert supervisor.restarts == 1
        await require_healthy(supervisor)

    with processing(FakeRecipe(tmp_path)) as supervisor:
        run(work)


@pytest.mark.parametrize(
    ("order", "kind", "cause"),
    [
        ("K", EngineDied, "SIGKILL"),
        ("A", EngineDied, "SIGABRT"),
        ("X", EngineDied, f"exit code {EXIT_CODE}"),
        ("F", DecodeFailed, "gave -3"),
        ("H", EngineDied, "SIGKILL"),
        ("G", EngineDied, "sent no valid message: 4 bytes are no message"),
    ],
)
def test_a_request_with_a_delivered_event_fails_with_the_cause(
    tmp_path: Path, order: str, kind: type[EngineError], cause: str
) -> None:
    async def work() -> None:
        events = await collect(supervisor.submit(request("a", max_tokens=50)))
        assert text(events, "a").startswith("he")
        failure = error(events, "a")
        assert isinstance(failure, kind)
        assert cause in str(failure)
        assert supervisor.last_cause == str(failure)
        await require_healthy(supervisor)

    with processing(FakeRecipe(tmp_path, script=f"he{order}llo")) as supervisor:
        run(work)


def test_a_whole_answer_survives_an_engine_that_ends_in_its_middle(tmp_path: Path) -> None:
    async def work() -> None:
        events = await collect(supervisor.submit(request("a", max_tokens=50), whole=True))
        assert text(events, "a") == "heKllo"
        assert isinstance(end(events, "a"), Finished)

    with processing(FakeRecipe(tmp_path, script="heKllo")) as supervisor:
        run(work)
        assert supervisor.restarts == 1


def test_a_request_that_kills_every_engine_is_tried_twice_and_then_fails(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        for name in ("poison", "more poison"):
            assert isinstance(error(await collect(supervisor.submit(request(name, "P"))), name), EngineDied)
        await require_healthy(supervisor)
        assert (supervisor.restarts, len(recipe.pids)) == (4, 5)

    with processing(recipe) as supervisor:
        run(work)


def test_killed_from_outside_while_it_decodes(tmp_path: Path) -> None:
    """Real kill -9 with running and waiting requests, and one that comes while there is no engine."""
    recipe = FakeRecipe(tmp_path, slots=2)

    async def work() -> None:
        running = supervisor.submit(request("a", "Wbc"), request("b"), request("c"))
        await until((tmp_path / "waits").exists)
        (tmp_path / "die").touch()
        os.kill(recipe.pids[0], signal.SIGKILL)
        await until(lambda: supervisor.state == "restarting")
        late = supervisor.submit(request("d"))
        gone = supervisor.submit(request("e"))
        gone.cancel()
        assert isinstance(error(await collect(gone), "e"), Cancelled)
        (tmp_path / "go").touch()
        (tmp_path / "die").unlink()
        events = await collect(running) + await collect(late)
        assert [text(events, name) for name in "abcd"] == ["hello"] * 4
        await require_healthy(supervisor)

    with processing(recipe, restarts=RestartPolicy(deaths=1000, pause_s=0.01, window_s=0)) as supervisor:
        run(work)
        assert "SIGKILL" in (supervisor.last_cause or "")


def test_a_cancelled_request_is_not_given_to_the_next_engine(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        stream = supervisor.submit(request("a", "W"))
        await until((tmp_path / "waits").exists)
        stream.cancel()
        os.kill(recipe.pids[0], signal.SIGKILL)
        assert isinstance(error(await collect(stream), "a"), Cancelled)
        await require_healthy(supervisor)

    with processing(recipe) as supervisor:
        run(work)


def test_totals_continue_after_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        await collect(supervisor.submit(request("a")))
        before = supervisor.stats()
        await collect(supervisor.submit(request("b", "K")))
        after = supervisor.stats()
        assert after.generated_tokens_total == before.generated_tokens_total + 5
        assert after.steps_total > before.steps_total
        assert after.kv_cells_total == before.kv_cells_total
        assert (before.engine_restarts_total, after.engine_restarts_total) == (0, 1)

    with processing(FakeRecipe(tmp_path)) as supervisor:
        run(work)


def test_engines_that_die_one_after_the_other_exhaust_the_restarts(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        (tmp_path / "die").touch()
        waiting = supervisor.submit(request("a", "P"))
        assert isinstance(error(await collect(waiting), "a"), EngineDied)
        assert supervisor.state == "failed"
        with pytest.raises(EngineDown, match="SIGKILL"):
            supervisor.submit(request("b"))
        assert len(recipe.pids) == 3

    with processing(recipe, restarts=RestartPolicy(deaths=3, pause_s=0.01)) as supervisor:
        run(work)
    assert supervisor.state == "failed"


def test_a_model_that_is_gone_at_the_restart_fails_the_requests_and_is_not_tried_again(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        (tmp_path / "refuse").touch()
        failure = error(await collect(supervisor.submit(request("a", "P"))), "a")
        assert isinstance(failure, LoadFailed)
        assert "tensor 'x' not found" in str(failure)
        assert (supervisor.state, len(recipe.pids)) == ("failed", 2)

    with processing(recipe) as supervisor:
        run(work)


@pytest.mark.parametrize(("order", "reason"), [("refuse", "tensor 'x' not found"), ("die", "SIGKILL")])
def test_a_model_that_cannot_be_loaded_is_not_tried_again(tmp_path: Path, order: str, reason: str) -> None:
    (tmp_path / order).touch()
    recipe = FakeRecipe(tmp_path)
    with pytest.raises(LoadFailed, match=reason), processing(recipe):
        pass
    assert len(recipe.pids) == 1
    assert not alive(recipe.pids[0])


def test_an_engine_that_dies_while_draining_is_replaced(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        stream = supervisor.submit(request("a", "W"))
        await until((tmp_path / "waits").exists)
        draining = asyncio.create_task(supervisor.drain(PATIENCE_S))
        await until(lambda: supervisor.state == "draining")
        os.kill(recipe.pids[0], signal.SIGKILL)
        (tmp_path / "go").touch()
        assert text(await collect(stream), "a") == "hello"
        await draining
        assert (supervisor.state, supervisor.restarts) == ("draining", 1)

    with processing(recipe) as supervisor:
        run(work)


@pytest.mark.parametrize("frozen", [False, True])
def test_stop_ends_an_engine_that_hangs(tmp_path: Path, frozen: bool) -> None:
    """Stuck in a decode it leaves by itself; a process that does nothing at all is killed."""
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        stream = supervisor.submit(request("a", "WS"))
        await until((tmp_path / "waits").exists)
        (tmp_path / "go").touch()
        if frozen:
            os.kill(recipe.pids[0], signal.SIGSTOP)
        assert supervisor.silent_s > 0
        await asyncio.to_thread(supervisor.stop)
        assert isinstance(error(await collect(stream), "a"), ShuttingDown)

    with processing(recipe, stop_s=0.2 if frozen else PATIENCE_S) as supervisor:
        run(work)
    assert supervisor.live == 0


def test_an_engine_that_sends_nothing_is_killed_and_the_next_one_answers(tmp_path: Path) -> None:
    ahead_s = [0.0]

    async def work() -> None:
        stream = supervisor.submit(request("a", "S"))
        await until((tmp_path / "done-S").exists)
        ahead_s.append(3600.0)  # the engine is silent for an hour; the next one is not
        assert text(await collect(stream), "a") == "hello"
        assert "silent for" in (supervisor.last_cause or "")
        await require_healthy(supervisor)

    def clock() -> float:
        return time.monotonic() + ahead_s[-1]

    with processing(FakeRecipe(tmp_path), watch_s=0.01, clock=clock) as supervisor:
        run(work)


def test_drain_does_not_wait_for_ever_for_an_engine_that_hangs(tmp_path: Path) -> None:
    async def work() -> None:
        stream = supervisor.submit(request("a", "WS"))
        await until((tmp_path / "waits").exists)
        (tmp_path / "go").touch()
        await supervisor.drain(0.05)
        assert isinstance(error(await collect(stream), "a"), ShuttingDown)

    with processing(FakeRecipe(tmp_path), cancel_s=0.05) as supervisor:
        run(work)


def test_stop_in_the_middle_of_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "die").touch()
        stream = supervisor.submit(request("a", "K"))
        await until(lambda: supervisor.restarts >= 2)
        await asyncio.to_thread(supervisor.stop)
        assert isinstance(error(await collect(stream), "a"), ShuttingDown)

    with processing(FakeRecipe(tmp_path), restarts=RestartPolicy(deaths=1000, pause_s=0.01, window_s=0)) as supervisor:
        run(work)
    assert supervisor.live == 0


def test_a_supervisor_that_was_never_started_leaves_no_process(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path)
    supervisor = EngineSupervisor(EngineProcess(recipe, "toy"), limits=SupervisorLimits(slots=1, queue=1))
    assert recipe.pids == []
    supervisor.launch()
    wait_until(lambda: recipe.pids)
    supervisor.stop()
    assert not alive(recipe.pids[0])


@pytest.mark.parametrize("signal_sent", [signal.SIGINT, signal.SIGTERM])
def test_a_terminals_signals_are_for_the_parent_to_judge(tmp_path: Path, signal_sent: signal.Signals) -> None:
    recipe = FakeRecipe(tmp_path)

    async def work() -> None:
        stream = supervisor.submit(request("a", "W"))
        await until((tmp_path / "waits").exists)
        os.kill(recipe.pids[0], signal_sent)
        (tmp_path / "go").touch()
        assert text(await collect(stream), "a") == "hello"

    with processing(recipe) as supervisor:
        run(work)
        assert supervisor.restarts == 0


PARENT = """
import asyncio, sys, time
from pathlib import Path
from tests.support.runtime.engine_process import processing
from tests.support.runtime.toy_engine import FakeRecipe
from tests.runtime.worker.test_process import request

async def work():
    supervisor.submit(request("a", "WS"))
    await asyncio.sleep(1000)

kept = Path(sys.argv[2]) if sys.argv[2:] else None
with processing(FakeRecipe(Path(sys.argv[1]), prefixes=kept)) as supervisor:
    asyncio.run(work())
"""


@pytest.mark.parametrize("keeps", [False, True])
def test_the_engine_exits_when_its_parent_is_killed(tmp_path: Path, keeps: bool) -> None:
    """Even in the middle of a decode that does not return, and with prefixes to write."""
    root = Path(__file__).parents[3]
    kept = [str(tmp_path / "kept")] if keeps else []
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), *kept], cwd=root) as parent:
        wait_until((tmp_path / "waits").exists)
        (tmp_path / "go").touch()
        [child] = FakeRecipe(tmp_path).pids
        assert alive(child)
        parent.kill()
    wait_until(lambda: not alive(child))


def test_what_an_engine_computed_is_on_disk_at_its_end_and_found_by_the_next(tmp_path: Path) -> None:
    recipe = FakeRecipe(tmp_path, prefixes=tmp_path / "kept")

    async def work() -> None:
        last = end(await collect(supervisor.submit(request("a", "abcdefghij" * 10))), "a")
        assert isinstance(last, Finished)
        found.append(last.usage.cached_tokens)

    found: list[int] = []
    for _ in range(2):
        with processing(recipe) as supervisor:
            run(work)
        assert len(files(tmp_path / "kept")) == 1
    assert found == [0, 98]


def test_the_parent_logs_and_prints_what_the_engine_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with processing(FakeRecipe(tmp_path)):
        pass
    assert ("deskside.llama", logging.WARNING, "a warning of llama.cpp") in caplog.record_tuples
    assert capfd.readouterr().err == "printed\n"


def test_causes_of_death_in_words() -> None:
    assert cause_of_death(3) == "exit code 3"
    assert cause_of_death(-11) == "killed by SIGSEGV"
    assert "memory" in cause_of_death(-9)
    assert cause_of_death(-63) == "killed by signal 63"
