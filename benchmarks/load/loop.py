"""The closed loop: a fixed number of users, each of whom sends the next request when the last one is answered.

It measures what a team's own jobs see at a steady concurrency. It does not measure how a server behaves when more
arrives than it can answer: that is an open loop, another experiment.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


async def closed_loop(
    jobs: Sequence[Item],
    concurrency: int,
    send: Callable[[Item, float], Awaitable[Result]],
    clock: Callable[[], float],
) -> tuple[Result, ...]:
    """Send every job once, never more than `concurrency` at a time; results in the order of `jobs`.

    `send(job, scheduled)` gets the moment its user became free, on `clock`. It is expected to turn faults of the
    server into results: an exception it lets out stops the loop and is raised here.
    """
    results: dict[int, Result] = {}
    remaining = iter(enumerate(jobs))

    async def user() -> None:
        for index, job in remaining:
            results[index] = await send(job, clock())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(user())
    return tuple(results[index] for index in range(len(jobs)))
