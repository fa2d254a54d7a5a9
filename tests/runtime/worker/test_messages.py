"""The pipe between supervisor and engine: whole messages or an end, and nothing but our nouns from the engine."""

import io
import os
import pickle

import numpy as np
import pytest

from runtime.errors import DecodeFailed, InvalidRequest
from runtime.requests import EngineStats, Failed, Finished, Scored, TextDelta, TokenLogprob, Usage
from runtime.worker.messages import Broke, Logged, Ready, Stepped, read_nouns, read_trusted, write_message
from tests.support.runtime.fakes import fake_info

STATS = EngineStats(1, 2, 3, 4, 5, 6, 7, 8, 9)
USAGE = Usage(1, 2, 3)
MESSAGES = [
    Ready(fake_info(), STATS),
    Broke(DecodeFailed("llama_decode gave -3")),
    Logged("deskside.llama", 20, "a line"),
    Stepped(
        (
            TextDelta("a", "ä", (1, 2), (TokenLogprob(1, b"x", float(np.float32(-0.5)), ((1, b"x", -0.5),)),)),
            Finished("a", "stop", USAGE),
            Scored("b", ((np.float64(-1.5), -2.0),), USAGE),
        ),
        STATS,
    ),
]


def sent(*messages: object) -> bytes:
    pipe = io.BytesIO()
    for message in messages:
        write_message(pipe, message)
    return pipe.getvalue()


def test_every_message_of_the_engine_arrives_as_it_was() -> None:
    pipe = io.BytesIO(sent(*MESSAGES))
    arrived = [read_nouns(pipe) for _ in MESSAGES]
    assert arrived[0] == MESSAGES[0]
    assert arrived[2:] == MESSAGES[2:]
    assert isinstance(arrived[1].error, DecodeFailed)
    with pytest.raises(EOFError):
        read_nouns(pipe)


def test_an_error_keeps_its_fields() -> None:
    error = InvalidRequest("no", param="n", code="special")
    [event] = read_nouns(io.BytesIO(sent(Stepped((Failed("a", error),), STATS)))).events
    assert (str(event.error), event.error.param, event.error.code) == ("no", "n", "special")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60])
def test_a_message_that_breaks_off_is_an_end(length: int) -> None:
    data = sent(MESSAGES[0])
    for read in (read_nouns, read_trusted):
        with pytest.raises(EOFError):
            read(io.BytesIO(data[:length]))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("false",)


@pytest.mark.parametrize("message", [Evil(), Stepped((Failed("a", KeyError("x")),), STATS), np.load])
def test_nothing_but_our_nouns_is_made_of_what_the_engine_sends(message: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="no noun of the protocol"):
        read_nouns(io.BytesIO(sent(message)))
