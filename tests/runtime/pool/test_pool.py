"""The pool over toy models: one load for all waiting requests, none unloaded while leased, within the budget."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from runtime.errors import DecodeFailed, EngineDown, LoadFailed, ModelUnknown, NoRoom, Overloaded, ShuttingDown
from runtime.pool.pool import RETRY_SECONDS, ModelPool, PoolOptions
from runtime.pool.slot import ModelSlot
from runtime.requests import Failed, Request, SamplingParams
from tests.support.runtime.fakes import FakeLlama
from tests.support.runtime.serving import PATIENCE_S, Toys

NAMES = ("a", "b", "c")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Barrier:
    """Holds loads, in the thread that loads, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, _: str = "") -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE_S)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, PATIENCE_S)

    def open(self) -> None:
        self._open.set()


def make_toys(on_load: Callable[[str], None] = lambda _: None, **special: Callable[[], FakeLlama]) -> Toys:
    plain = {name: lambda: FakeLlama(script="hello") for name in NAMES}
    return Toys(plain | special, on_load=on_load)


def make_pool(
    toys: Toys, slots: Iterable[ModelSlot] = (), clock: Callable[[], float] | None = None, **options: Any
) -> ModelPool:
    """Of `slots`, or of three toys that need a byte each."""
    chosen = PoolOptions(**{"room_wait_s": 0.0} | options)
    return ModelPool(list(slots) or [toys.slot(name) for name in NAMES], toys.load, chosen, clock or Clock())


def run(pool: ModelPool, work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE_S), pool.running():
            await work()
        assert [(slot.leases, slot.waiting, slot.loaded, slot.loading) for slot in pool.slots] == [
            (0, 0, None, None) for _ in pool.slots
        ]

    asyncio.run(limited())


def states(pool: ModelPool) -> dict[str, str]:
    return {slot.name: slot.shown_state for slot in pool.slots}


async def use(pool: ModelPool, name: str | None = None) -> None:
    async with pool.lease(name):
        pass


async def answer(pool: ModelPool, name: str) -> str:
    """The answer of the model. Raises the error of a request that failed."""
    async with pool.lease(name) as served:
        stream = served.supervisor.submit(Request(f"r{random.random()}", (1, 2, 3), SamplingParams(max_tokens=9)))
        events = [event async for event in stream]
    if isinstance(events[-1], Failed):
        raise events[-1].error
    return "".join(getattr(event, "text", "") for event in events)


def test_two_requests_for_an_unloaded_model_load_it_once() -> None:
    barrier = Barrier()
    toys = make_toys(barrier)
    pool = make_pool(toys)

    async def work() -> None:
        answers = [asyncio.create_task(answer(pool, "b")) for _ in range(2)]
        await barrier.wait()
        assert (states(pool)["b"], pool.slots[1].waiting) == ("loading", 2)
        barrier.open()
        assert await asyncio.gather(*answers) == ["hello", "hello"]

    run(pool, work)
    assert [name for name, _ in toys.made] == ["b"]
    assert all(llama.closed for _, llama in toys.made)


def test_a_request_without_a_model_goes_to_the_first_and_an_unknown_name_is_refused_with_those_served() -> None:
    pool = make_pool(make_toys())

    async def work() -> None:
        async with pool.lease() as served:
            assert served.name == "a"
        with pytest.raises(ModelUnknown, match=r"'gpt-9' is not served here; this server has 'a', 'b', 'c'"):
            await use(pool, "gpt-9")

    run(pool, work)


def test_a_mistyped_name_is_answered_with_the_one_that_was_meant() -> None:
    pool = make_pool(make_toys())
    with pytest.raises(ModelUnknown, match=r"this server has 'a', 'b', 'c'; did you mean 'b'\?"):
        pool.find("B")


def test_a_waiter_that_leaves_stops_no_load() -> None:
    barrier = Barrier()
    pool = make_pool(make_toys(barrier))

    async def work() -> None:
        leaving, staying = (asyncio.create_task(answer(pool, "a")) for _ in range(2))
        await barrier.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        barrier.open()
        assert await staying == "hello"

    run(pool, work)
    assert pool.slots[0].loads == 1


def test_the_least_recently_used_idle_model_makes_room() -> None:
    clock = Clock()
    pool = make_pool(make_toys(), clock=clock, budget_bytes=2)

    async def work() -> None:
        for name in ("a", "b", "a", "c"):
            clock.now_s += 1
            await use(pool, name)
        assert states(pool) == {"a": "ready", "b": "unloaded", "c": "ready"}
        async with pool.lease("a"):  # now the oldest, but in use
            clock.now_s += 1
            await use(pool, "c")
            await use(pool, "b")
        assert states(pool) == {"a": "ready", "b": "ready", "c": "unloaded"}

    run(pool, work)


def test_no_room_beside_busy_models_names_need_budget_and_who_is_busy() -> None:
    toys = make_toys()
    slots = [toys.slot("a", needs=3 << 20), toys.slot("b", needs=2 << 20), toys.slot("c", needs=4 << 20)]
    pool = make_pool(toys, slots, budget_bytes=6 << 20)

    async def work() -> None:
        await use(pool, "b")
        async with pool.lease("a"):
            with pytest.raises(
                NoRoom, match=r"'c' needs about 4 MiB, the memory budget is 6 MiB.*'a' \(3 MiB\)"
            ) as hit:
                await use(pool, "c")
            assert hit.value.retry_after_s >= 1
            assert states(pool) == {"a": "ready", "b": "ready", "c": "unloaded"}, "b went for nothing"
        await use(pool, "c")
        assert states(pool) == {"a": "unloaded", "b": "ready", "c": "ready"}

    run(pool, work)


def test_a_load_waits_a_while_for_a_busy_model_to_become_idle() -> None:
    pool = make_pool(make_toys(), budget_bytes=1, room_wait_s=PATIENCE_S)

    async def work() -> None:
        async with AsyncExitStack() as busy:
            await busy.enter_async_context(pool.lease("a"))
            waiting = asyncio.create_task(answer(pool, "b"))
            while not pool.slots[1].waiting:
                await asyncio.sleep(0)
            await busy.aclose()
            assert await waiting == "hello"

    run(pool, work)


def test_a_model_that_never_fits_is_refused_before_anything_is_loaded() -> None:
    toys = make_toys()
    pool = make_pool(toys, [toys.slot("a"), toys.slot("b", needs=3 << 20)], budget_bytes=1 << 20)
    with pytest.raises(LoadFailed, match=r"'b' needs about 3 MiB.*budget is 1 MiB; try a smaller --context"):
        pool.load_at_start()
    assert toys.made == []


def test_at_the_start_the_first_is_loaded_and_others_as_far_as_they_fit() -> None:
    toys = make_toys()
    pool = make_pool(toys, [toys.slot("a", needs=2), toys.slot("b", needs=3), toys.slot("c", needs=1)], budget_bytes=4)
    pool.load_at_start()
    assert states(pool) == {"a": "ready", "b": "unloaded", "c": "ready"}
    pool.close()
    assert all(llama.closed for _, llama in toys.made)


def test_a_load_that_fails_at_the_start_leaves_nothing_running() -> None:
    def on_load(name: str) -> None:
        if name == "b":
            raise LoadFailed("damaged")

    toys = make_toys(on_load)
    pool = make_pool(toys)
    with pytest.raises(LoadFailed, match="damaged"):
        pool.load_at_start()
    assert [(name, llama.closed) for name, llama in toys.made] == [("a", True)]


@pytest.mark.parametrize("error", [LoadFailed("'b' is damaged"), MemoryError()], ids=["ours", "foreign"])
def test_a_failed_load_fails_all_waiting_requests_and_is_not_tried_again_at_once(error: Exception) -> None:
    clock, tries, barrier = Clock(), list[str](), Barrier()

    def on_load(name: str) -> None:
        tries.append(name)
        if len(tries) < 3:
            barrier()
            raise error

    pool = make_pool(make_toys(on_load), clock=clock)

    async def work() -> None:
        waiting = [asyncio.create_task(answer(pool, "b")) for _ in range(3)]
        await barrier.wait()
        barrier.open()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [LoadFailed] * 3
        assert all("'b'" in str(result) for result in results)
        for wait_s in (RETRY_SECONDS, 2 * RETRY_SECONDS):
            clock.now_s += wait_s - 1
            with pytest.raises(LoadFailed, match=r"'b'.*tried again in 1 s"):
                await use(pool, "b")
            clock.now_s += 1
            if len(tries) == 1:
                with pytest.raises(LoadFailed):
                    await use(pool, "b")
        assert await answer(pool, "b") == "hello"
        assert (states(pool)["b"], pool.slots[1].failures, len(tries)) == ("ready", 2, 3)

    run(pool, work)


def test_the_requests_that_wait_for_one_load_are_bounded() -> None:
    barrier = Barrier()
    pool = make_pool(make_toys(barrier), capacity=2)

    async def work() -> None:
        waiting = [asyncio.create_task(answer(pool, "a")) for _ in range(2)]
        await barrier.wait()
        with pytest.raises(Overloaded, match="2 requests wait for 'a' to be loaded, limit 2"):
            await use(pool, "a")
        barrier.open()
        await asyncio.gather(*waiting)

    run(pool, work)


def test_draining_refuses_waiting_requests_at_once_and_stops_a_model_loaded_meanwhile() -> None:
    barrier = Barrier()
    toys = make_toys(barrier)
    pool = make_pool(toys)

    async def work() -> None:
        waiting = [asyncio.create_task(answer(pool, "a")) for _ in range(2)]
        await barrier.wait()
        await pool.drain(0)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [ShuttingDown] * 2
        with pytest.raises(ShuttingDown):
            await use(pool, "b")
        barrier.open()

    run(pool, work)
    assert [(name, llama.closed) for name, llama in toys.made] == [("a", True)]


def test_idle_models_are_unloaded_after_the_idle_time_and_loaded_again_on_request() -> None:
    clock = Clock()
    pool = make_pool(make_toys(), clock=clock, idle_s=60)

    async def work() -> None:
        async with pool.lease("b"):
            await use(pool, "a")
            clock.now_s += 59
            await pool.unload_idle()
            assert states(pool) == {"a": "ready", "b": "ready", "c": "unloaded"}
            clock.now_s += 1
            await pool.unload_idle()
            assert states(pool) == {"a": "unloaded", "b": "ready", "c": "unloaded"}
        await pool.unload_idle()
        assert states(pool)["b"] == "ready", "it was in use a moment ago"
        assert await answer(pool, "a") == "hello"
        assert (pool.slots[0].loads, pool.slots[0].unloads) == (2, 1)

    run(pool, work)


class SlowToClose(FakeLlama):
    """Takes its time to be freed."""

    barrier: Barrier

    def close(self) -> None:
        self.barrier()
        super().close()


def test_a_request_for_a_model_on_its_way_out_waits_and_gets_it_again() -> None:
    barrier = SlowToClose.barrier = Barrier()
    toys = make_toys(a=lambda: SlowToClose(script="hello"))
    pool = make_pool(toys)

    async def work() -> None:
        await use(pool, "a")
        unloading = asyncio.create_task(pool.unload_idle())
        await barrier.wait()
        assert states(pool)["a"] == "unloading"
        asked = asyncio.create_task(answer(pool, "a"))
        while not pool.slots[0].waiting:
            await asyncio.sleep(0)
        barrier.open()
        assert await asked == "hello"
        await unloading

    run(pool, work)
    assert len(toys.made) == 2


def test_an_engine_that_breaks_harms_no_other_and_is_loaded_again_later() -> None:
    clock = Clock()
    made = iter([FakeLlama(script="hello", fail_at={0: DecodeFailed("-3")}), FakeLlama(script="again")])
    pool = make_pool(make_toys(b=lambda: next(made)), clock=clock)

    async def work() -> None:
        with pytest.raises(DecodeFailed):
            await answer(pool, "b")
        assert await answer(pool, "a") == "hello"
        assert states(pool)["b"] == "failed"
        assert not pool.broken
        for _ in range(2):
            with pytest.raises(EngineDown, match="'b': the engine stopped: -3; it is tried again in 15 s"):
                await use(pool, "b")
        clock.now_s += RETRY_SECONDS
        assert await answer(pool, "b") == "again"

    run(pool, work)


def test_a_pool_is_broken_when_every_engine_is() -> None:
    toys = make_toys(a=lambda: FakeLlama(script="hello", fail_at={0: DecodeFailed("-3")}))
    pool = make_pool(toys, [toys.slot("a")])

    async def work() -> None:
        with pytest.raises(DecodeFailed):
            await answer(pool, "a")
        assert pool.broken

    run(pool, work)


@pytest.mark.parametrize("seed", range(5))
def test_under_random_requests_the_budget_holds_and_leased_models_are_loaded(seed: int) -> None:
    draw, toys = random.Random(seed), make_toys()
    slots = [toys.slot("a", needs=2), toys.slot("b", needs=1), toys.slot("c", needs=2)]
    pool = make_pool(toys, slots, budget_bytes=3, room_wait_s=PATIENCE_S)

    def check() -> None:
        assert sum(slot.need.total for slot in slots if slot.loaded or slot.state in ("loading", "unloading")) <= 3

    async def client() -> None:
        for _ in range(6):
            async with pool.lease(draw.choice(NAMES)) as served:
                check()
                assert pool.find(served.name)[0].loaded is not None
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
                check()
                assert served.supervisor.state == "ready"

    async def work() -> None:
        await asyncio.gather(*(client() for _ in range(5)))

    run(pool, work)
    assert sum(slot.loads for slot in slots) >= 3
