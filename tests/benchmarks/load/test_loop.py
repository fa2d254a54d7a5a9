"""The closed loop: how many at a time, in which order, and what a fault does."""

import asyncio

import pytest

from benchmarks.load.client import closed_loop


class Users:
    """A server that lets `hold` requests in before it answers any, and watches how many are inside."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def send(self, job: int, scheduled: float) -> tuple[int, float]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        for _ in range(job % 5 + 1):
            await asyncio.sleep(0)
        self.inside -= 1
        self.now += 1
        return job, scheduled


@pytest.mark.parametrize(("jobs", "concurrency", "most"), [(40, 1, 1), (40, 4, 4), (3, 16, 3), (0, 4, 0)])
def test_concurrency_is_reached_and_never_exceeded(jobs: int, concurrency: int, most: int) -> None:
    users = Users()
    results = asyncio.run(closed_loop(range(jobs), concurrency, users.send, users.clock))
    assert users.most == most
    assert [job for job, _ in results] == list(range(jobs))


def test_a_request_is_scheduled_when_its_user_becomes_free() -> None:
    users = Users()
    results = asyncio.run(closed_loop(range(4), 1, users.send, users.clock))
    assert [scheduled for _, scheduled in results] == [0, 1, 2, 3]


def test_an_exception_stops_the_loop() -> None:
    started: list[int] = []

    async def send(job: int, scheduled: float) -> None:
        started.append(job)
        await asyncio.sleep(0)
        raise ConnectionError(job)

    with pytest.raises(ExceptionGroup):
        asyncio.run(closed_loop(range(10), 2, send, lambda: 0.0))
    assert started == [0, 1]
