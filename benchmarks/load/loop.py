"""The closed loop: a fixed number of users, each sending its next request when the last one is answered.

It measures latency at a steady concurrency, as a team's own jobs see it. Arrivals faster than the server can answer
need an open loop, which is another experiment.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

WorkItem = TypeVar("WorkItem")
Result = TypeVar("Result")


async def closed_loop(
    items: Sequence[WorkItem],
    concurrency: int,
    send: Callable[[WorkItem, float], Awaitable[Result]],
    clock: Callable[[], float],
) -> tuple[Result, ...]:
    """Send every item once, at most `concurrency` at a time; results in the order of `items`.

    `send(item, scheduled)` gets the moment its user became free, on `clock`. It must turn faults of the server into
    results: an exception stops the loop and is raised in an ExceptionGroup.
    """
    results: dict[int, Result] = {}
    remaining = iter(enumerate(items))

    async def user() -> None:
        for index, item in remaining:
            results[index] = await send(item, clock())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(user())
    return tuple(results[index] for index in range(len(items)))
