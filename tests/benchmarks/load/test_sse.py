"""Server-sent events: any way of cutting the bytes gives the same events; an endless event is refused."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.client import MAX_EVENT_BYTES, sse_events

STREAM = (
    ": a comment\n\n"
    'data: {"a": "ü"}\r\n\r\n'
    "event: x\ndata: first\ndata:second\nid: 7\n\n"
    "data\r\rdata:  two spaces\n\n"
    "data: [DONE]\n\n"
    "data: never finished"
).encode()
EVENTS = ['{"a": "ü"}', "first\nsecond", " two spaces", "[DONE]"]
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8"}


def events_of(chunks: Iterable[bytes], headers: dict[str, str] = EVENT_STREAM) -> list[str]:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def read() -> list[str]:
        return [event async for event in sse_events(httpx.Response(200, headers=headers, content=body()))]

    return asyncio.run(read())


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_arrive(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert events_of(STREAM[start:end] for start, end in itertools.pairwise(edges)) == EVENTS


def test_every_single_byte() -> None:
    assert events_of(STREAM[i : i + 1] for i in range(len(STREAM))) == EVENTS


@pytest.mark.parametrize("line", [b"x", b"data: x\n"])
def test_an_endless_event_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=str(MAX_EVENT_BYTES)):
        events_of(itertools.repeat(line * 8192))


def test_many_events_may_be_longer_than_one_together() -> None:
    event = b"data: " + b"x" * (MAX_EVENT_BYTES // 4) + b"\n\n"
    assert len(events_of([event] * 9)) == 9


def test_another_kind_of_body_is_refused() -> None:
    with pytest.raises(httpx.HTTPError, match="text/event-stream"):
        events_of([STREAM], {"content-type": "application/json"})
