"""The event-stream parser against any way of cutting the bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.client import MAX_EVENT_BYTES, SseParser

STREAM = (
    ": a comment\n\n"
    'data: {"a": "ü"}\r\n\r\n'
    "event: x\ndata: first\ndata:second\nid: 7\n\n"
    "data\r\rdata:  two spaces\n\n"
    "data: [DONE]\n\n"
    "data: never finished"
).encode()
EVENTS = ['{"a": "ü"}', "first\nsecond", "", " two spaces", "[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_how_the_bytes_arrive(cuts: list[int]) -> None:
    parser, found = SseParser(), list[str]()
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        found += parser.feed(STREAM[start:end])
    assert found == EVENTS


def test_every_single_byte() -> None:
    parser = SseParser()
    assert [event for i in range(len(STREAM)) for event in parser.feed(STREAM[i : i + 1])] == EVENTS


def test_an_endless_line_is_refused() -> None:
    with pytest.raises(ValueError, match=str(MAX_EVENT_BYTES)):
        list(SseParser().feed(b"x" * (MAX_EVENT_BYTES + 1)))
