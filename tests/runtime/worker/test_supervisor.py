"""The supervisor over the real engine and a toy model in a thread: one terminal event per request, always."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager

import pytest

from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import Cancelled, DecodeFailed, EngineDown, InvalidRequest, Overloaded, ShuttingDown
from runtime.requests import Embedded, Event, Failed, Finished, Request, SamplingParams, Scored, TextDelta, Work
from runtime.worker.inflight import Stream
from runtime.worker.supervisor import EngineSupervisor
from tests.support.runtime.engine_thread import supervising
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import PATIENCE_S, Gate


def request(name: str, max_tokens: int = 5, prompt: str = "abc", **params: object) -> Request:
    return Request(name, tuple(prompt.encode()), SamplingParams(max_tokens, **params))  # type: ignore[arg-type]


def working(llama: FakeLlama, *, slots: int = 4, queue: int = 8) -> AbstractContextManager[EngineSupervisor]:
    return supervising(Engine(llama, EngineOptions(max_running=slots)), slots=slots, queue=queue)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work(), PATIENCE_S)

    asyncio.run(limited())


async def collect(stream: Stream) -> list[Event]:
    return [event async for event in stream]


def terminals(events: list[Event]) -> Mapping[str, list[Finished | Scored | Embedded | Failed]]:
    found: dict[str, list[Finished | Scored | Embedded | Failed]] = {}
    for event in events:
        if not isinstance(event, TextDelta):
            found.setdefault(event.request_id, []).append(event)
    return found


def text(events: list[Event], name: str) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta) and event.request_id == name)


def require_idle(supervisor: EngineSupervisor) -> None:
    """After the supervisor has stopped: nothing of any request is left."""
    assert supervisor.live == 0
    assert (supervisor.stats().running, supervisor.stats().waiting) == (0, 0)


def test_a_call_of_many_requests_is_one_stream_with_one_end_each() -> None:
    async def work() -> None:
        events = await collect(supervisor.submit(request("a"), request("b", 2), request("c")))
        assert {name: len(ends) for name, ends in terminals(events).items()} == {"a": 1, "b": 1, "c": 1}
        assert all(isinstance(end, Finished) for ends in terminals(events).values() for end in ends)
        assert (text(events, "a"), text(events, "b")) == ("hello", "he")

    with working(FakeLlama(script="hello")) as supervisor:
        run(work)
    require_idle(supervisor)


def test_concurrent_streams_get_their_own_events_and_equal_answers() -> None:
    async def work() -> None:
        streams = [supervisor.submit(request(f"r{i}", 12, seed=3)) for i in range(12)]
        answers = await asyncio.gather(*map(collect, streams))
        texts = [text(events, f"r{i}") for i, events in enumerate(answers)]
        assert set(texts) == {texts[0]}
        assert all(event.request_id == f"r{i}" for i, events in enumerate(answers) for event in events)

    with working(FakeLlama()) as supervisor:
        run(work)
    require_idle(supervisor)


def test_a_full_queue_refuses_the_whole_call_and_takes_it_once_there_is_room() -> None:
    gate = Gate()

    async def work() -> None:
        first = supervisor.submit(request("a"), request("b"))
        with pytest.raises(Overloaded, match="2 answers are running or waiting, limit 3") as caught:
            supervisor.submit(request("c"), request("d"))
        assert caught.value.retry_after_s >= 1
        assert supervisor.live == 2
        third = supervisor.submit(request("c"))
        gate.open()
        await asyncio.gather(collect(first), collect(third))
        assert len(terminals(await collect(supervisor.submit(request("c"), request("d"))))) == 2

    with working(FakeLlama(script="hello", on_decode=gate), slots=1, queue=2) as supervisor:
        run(work)
    require_idle(supervisor)


def test_a_call_that_can_never_fit_is_an_invalid_request() -> None:
    async def work() -> None:
        with pytest.raises(InvalidRequest, match="4 answers in one call, but only 3"):
            supervisor.submit(*(request(str(i)) for i in range(4)))

    with working(FakeLlama(), slots=1, queue=2) as supervisor:
        run(work)


def test_an_id_that_is_live_is_refused_and_the_first_keeps_its_stream() -> None:
    gate = Gate()

    async def work() -> None:
        first = supervisor.submit(request("a"))
        with pytest.raises(InvalidRequest, match="'a' is live already"):
            supervisor.submit(request("a"))
        gate.open()
        assert text(await collect(first), "a") == "hello"

    with working(FakeLlama(script="hello", on_decode=gate)) as supervisor:
        run(work)


def test_cancel_ends_a_running_and_a_waiting_request_within_one_step() -> None:
    gate = Gate()
    llama = FakeLlama(script="hello " * 50, on_decode=gate)

    async def work() -> None:
        running, waiting = supervisor.submit(request("a", 300)), supervisor.submit(request("b", 300))
        await asyncio.to_thread(gate.arrived.acquire)
        gate.open(1)
        await asyncio.to_thread(gate.arrived.acquire)
        running.cancel()
        waiting.cancel()
        running.cancel()
        gate.open()
        for stream, name in ((running, "a"), (waiting, "b")):
            ends = terminals(await collect(stream))[name]
            assert len(ends) == 1
            assert isinstance(ends[0], Failed)
            assert isinstance(ends[0].error, Cancelled)
        assert llama.decodes == 2
        running.cancel()
        assert text(await collect(supervisor.submit(request("c", 5))), "c") == "hello"

    with working(llama, slots=1) as supervisor:
        run(work)
    require_idle(supervisor)


def test_a_fatal_decode_fails_every_live_request_once_and_refuses_the_next() -> None:
    gate = Gate()
    llama = FakeLlama(script="hello", on_decode=gate, fail_at={2: DecodeFailed("llama_decode returned -3")})

    async def work() -> None:
        stream = supervisor.submit(request("a"), request("b"), request("c"))
        gate.open()
        ends = terminals(await collect(stream))
        assert {name: [type(end) for end in found] for name, found in ends.items()} == {n: [Failed] for n in "abc"}
        while supervisor.state == "ready":  # the thread says `failed` just after it has handed over the last event
            await asyncio.sleep(0.001)
        with pytest.raises(EngineDown, match="-3"):
            supervisor.submit(request("d"))

    with working(llama, slots=2) as supervisor:
        run(work)
        assert supervisor.state == "failed"
    assert supervisor.live == 0


class BrokenEngine(Engine):
    """Raises an error that no engine should."""

    def step(self) -> list[Event]:
        raise ZeroDivisionError("a bug")


def test_a_bug_in_the_engine_fails_every_request() -> None:
    async def work() -> None:
        ends = terminals(await collect(supervisor.submit(request("a"), request("b"))))
        errors = [end.error for found in ends.values() for end in found if isinstance(end, Failed)]
        assert [type(error) for error in errors] == [EngineDown, EngineDown]

    with supervising(BrokenEngine(FakeLlama())) as supervisor:
        run(work)
    assert supervisor.state == "failed"


class PickyEngine(Engine):
    """Refuses one request."""

    def add(self, request: Work) -> None:
        if request.id == "bad":
            raise InvalidRequest("not this one")
        super().add(request)


def test_a_request_the_engine_refuses_harms_no_other() -> None:
    async def work() -> None:
        good, bad = supervisor.submit(request("good")), supervisor.submit(request("bad"))
        assert text(await collect(good), "good") == "hello"
        [[end]] = terminals(await collect(bad)).values()
        assert isinstance(end, Failed)
        assert isinstance(end.error, InvalidRequest)

    with supervising(PickyEngine(FakeLlama(script="hello"))) as supervisor:
        run(work)
    require_idle(supervisor)


def test_drain_lets_live_requests_finish_and_takes_no_new_ones() -> None:
    gate = Gate()

    async def work() -> None:
        stream = supervisor.submit(request("a"), request("b"))
        draining = asyncio.create_task(supervisor.drain(PATIENCE_S))
        await asyncio.sleep(0)
        assert supervisor.state == "draining"
        with pytest.raises(ShuttingDown, match="draining"):
            supervisor.submit(request("c"))
        gate.open()
        events = await collect(stream)
        await draining
        assert (text(events, "a"), text(events, "b")) == ("hello", "hello")
        assert supervisor.live == 0

    with working(FakeLlama(script="hello", on_decode=gate), slots=1) as supervisor:
        run(work)
    require_idle(supervisor)


def test_drain_fails_what_does_not_finish_in_time() -> None:
    gate = Gate()

    async def work() -> None:
        stream = supervisor.submit(request("a", 300), request("b", 300))
        await asyncio.to_thread(gate.arrived.acquire)
        draining = asyncio.create_task(supervisor.drain(0))
        while not draining.done():
            gate.open(1)
            await asyncio.sleep(0.001)
        ends = terminals(await collect(stream))
        assert all(isinstance(end, Failed) and isinstance(end.error, ShuttingDown) for [end] in ends.values())
        assert len(ends) == 2

    with working(FakeLlama(script="hello " * 50, on_decode=gate), slots=1) as supervisor:
        run(work)
    require_idle(supervisor)


def test_stop_with_work_in_flight_ends_it_and_frees_the_model() -> None:
    gate = Gate()
    llama = FakeLlama(script="hello " * 50, on_decode=gate)

    async def work() -> None:
        stream = supervisor.submit(request("a", 300))
        await asyncio.to_thread(gate.arrived.acquire)
        stopping = asyncio.create_task(asyncio.to_thread(supervisor.stop))
        while supervisor.state != "stopped":
            await asyncio.sleep(0.001)
        gate.open()
        [end] = terminals(await collect(stream))["a"]
        await stopping
        assert isinstance(end, Failed)
        assert isinstance(end.error, ShuttingDown)

    with working(llama) as supervisor:
        run(work)
    assert supervisor.live == 0
    assert llama.closed


def test_a_reader_that_stalls_holds_up_neither_the_engine_nor_its_neighbours() -> None:
    async def work() -> None:
        stalled, other = supervisor.submit(request("a", 40)), supervisor.submit(request("b", 40))
        assert len(text(await collect(other), "b")) == 40
        while supervisor.live:
            await asyncio.sleep(0.001)
        events = await collect(stalled)
        assert len(events) <= 41
        assert len(text(events, "a")) == 40

    with working(FakeLlama(script="hello " * 50), slots=2) as supervisor:
        run(work)
    require_idle(supervisor)


def test_an_event_loop_that_died_with_its_streams_gives_its_slots_back() -> None:
    gate = Gate()

    async def leave() -> None:
        supervisor.submit(request("a", 300))
        await asyncio.to_thread(gate.arrived.acquire)

    async def work() -> None:
        assert text(await collect(supervisor.submit(request("b"))), "b") == "hello"

    llama = FakeLlama(script="hello " * 50, on_decode=gate)
    with working(llama, slots=1) as supervisor:
        run(leave)
        gate.open()
        run(work)
        assert llama.decodes < 50
    require_idle(supervisor)


def test_the_first_token_is_timed_when_it_comes_not_when_it_is_read() -> None:
    async def work() -> None:
        times: list[float] = []
        stream = supervisor.submit(request("a"))
        stream.on_first_token = times.append
        while supervisor.live:
            await asyncio.sleep(0.001)
        assert len(times) == 1
        await collect(stream)
        assert len(times) == 1

    with working(FakeLlama(script="hello")) as supervisor:
        run(work)
