"""The pipe between supervisor and engine: whole messages or an end, and nothing but messages of the protocol."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.options import EngineOptions
from runtime.errors import DecodeFailed, InvalidRequest, Overloaded
from runtime.llama.interface import LoadOptions
from runtime.requests import (
    Embedded,
    Embedding,
    EngineStats,
    Failed,
    Finished,
    Grammar,
    Request,
    SamplingParams,
    Scored,
    Scoring,
    ScoringPrompt,
    TextDelta,
    TokenLogprob,
    Usage,
)
from runtime.serving.recipe import LlamaRecipe
from runtime.worker import messages
from runtime.worker.messages import (
    MAX_FRAME_BYTES,
    Add,
    Cancel,
    Died,
    Logged,
    MessageInvalid,
    Ready,
    Start,
    Stepped,
    pack_recipe,
    read_from_engine,
    read_to_engine,
    unpack_recipe,
    write_message,
)
from tests.support.runtime.fakes import fake_info

STATS = EngineStats(1, 2, 3, 4, 5, 6, 7, 8, 9)
USAGE = Usage(1, 2, 3)
PARAMS = SamplingParams(
    9,
    seed=(1 << 64) - 1,
    stop=("ä", "b"),
    logit_bias={7: -100.0},
    grammar=Grammar("choice", '["a"]', "choice"),
    spelled=(3,),
)
LOGPROB = TokenLogprob(1, b"\xff", -0.5, ((1, b"x", -0.5), (2, b"", float("-inf"))))
FROM_ENGINE = [
    Ready(fake_info(), STATS),
    Logged("deskside.llama", 20, "a line"),
    Stepped((), STATS),
    Stepped((TextDelta("a", "ä", (1, 2), (LOGPROB,)), Finished("a", "stop", USAGE)), STATS),
    Stepped((Scored("b", ((-1.5, -2.0), (0.0,)), USAGE),), STATS),
]
TO_ENGINE = [
    Start("module:Name", b"\x00", {"deskside": 20}),
    Add(Request("a", (1, 2, 3), PARAMS, "mail")),
    Add(Scoring("b", (ScoringPrompt((1, 2), ((3,), (4, 5)), (6,)),))),
    Add(Embedding("c", ((1, 2), (3,)))),
]


def sent(*sending: Any) -> bytes:
    pipe = io.BytesIO()
    for message in sending:
        write_message(pipe, message)
    return pipe.getvalue()


def framed(data: bytes) -> io.BytesIO:
    return io.BytesIO(len(data).to_bytes(8, "little") + data)


@pytest.mark.parametrize(("read", "sending"), [(read_from_engine, FROM_ENGINE), (read_to_engine, TO_ENGINE)])
def test_every_message_arrives_as_it_was(read: Callable[[BinaryIO], Any], sending: list[Any]) -> None:
    pipe = io.BytesIO(sent(*sending))
    assert [read(pipe) for _ in sending] == sending
    with pytest.raises(EOFError):
        read(pipe)


def test_vectors_arrive_bit_for_bit() -> None:
    vectors = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    vectors[1, 2] = np.nan
    for given_vectors in (vectors, np.asfortranarray(vectors), vectors[::-1], np.empty((0, 5), np.float32)):
        message: Any = read_from_engine(io.BytesIO(sent(Stepped((Embedded("a", given_vectors, USAGE),), STATS))))
        [event] = message.events
        assert event.vectors.dtype == np.float32
        assert event.vectors.shape == given_vectors.shape
        assert event.vectors.tobytes() == given_vectors.tobytes()


def test_numpys_numbers_arrive_as_pythons() -> None:
    scored = Scored("b", ((np.float64(-1.5), np.float32(-0.25)),), USAGE)  # type: ignore[arg-type]
    message: Any = read_from_engine(io.BytesIO(sent(Stepped((scored,), STATS))))
    [[first, second]] = message.events[0].logprobs
    assert (first, second) == (-1.5, -0.25)
    assert type(first) is type(second) is float


def test_errors_keep_their_fields() -> None:
    refused = InvalidRequest("no", param="n", code="special")
    full = Overloaded("full", retry_after_s=7)
    pipe = io.BytesIO(sent(Stepped((Failed("a", refused), Failed("b", full)), STATS), Died(DecodeFailed("gave -3"))))
    stepped: Any = read_from_engine(pipe)
    first, second = (event.error for event in stepped.events)
    assert (type(first), str(first), first.param, first.code) == (InvalidRequest, "no", "n", "special")
    assert (type(second), second.code, second.retry_after_s) == (Overloaded, "queue_full", 7)
    died: Any = read_from_engine(pipe)
    assert (type(died.error), str(died.error)) == (DecodeFailed, "gave -3")
    cancel: Any = read_to_engine(io.BytesIO(sent(Cancel(("a",), refused))))
    assert (cancel.request_ids, type(cancel.error)) == (("a",), InvalidRequest)


def test_an_error_that_names_an_undecodable_file_arrives() -> None:
    message: Any = read_from_engine(io.BytesIO(sent(Died(DecodeFailed("\udcff.gguf is gone")))))
    assert str(message.error) == "\\udcff.gguf is gone"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60])
@pytest.mark.parametrize(("read", "message"), [(read_from_engine, FROM_ENGINE[0]), (read_to_engine, TO_ENGINE[1])])
def test_a_message_that_breaks_off_is_an_end(read: Callable[[BinaryIO], Any], message: Any, length: int) -> None:
    with pytest.raises(EOFError):
        read(io.BytesIO(sent(message)[:length]))


HOSTILE = {
    "empty": b"",
    "a pickle": pickle.dumps(print),
    "a lone number": msgspec.msgpack.encode(7),
    "no type": msgspec.msgpack.encode([]),
    "an unknown type": msgspec.msgpack.encode(["Exec", "rm"]),
    "the other direction's": sent(TO_ENGINE[1])[8:],
    "too few fields": msgspec.msgpack.encode(["Logged", "a"]),
    "too many fields": msgspec.msgpack.encode(["Logged", "a", 1, "b", 2]),
    "a wrong field": msgspec.msgpack.encode(["Logged", "a", "1", "b"]),
    "trailing bytes": sent(FROM_ENGINE[1])[8:] + b"\x00",
    "not UTF-8": msgspec.msgpack.encode(["Logged", "a", 1, "b"]).replace(b"\xa1b", b"\xa1\xff"),
    "an unknown error": msgspec.msgpack.encode(["Died", ["SystemExit", "bye"]]),
    "an error of numbers": msgspec.msgpack.encode(["Died", [1, 2]]),
    "vectors of another size": msgspec.msgpack.encode(
        ["Stepped", [["Embedded", "a", [[2, 3], b"1234"], [1, 2, 3]]], list(range(14))]
    ),
    "vectors of a negative shape": msgspec.msgpack.encode(
        ["Stepped", [["Embedded", "a", [[-1, -1], b"1234"], [1, 2, 3]]], list(range(14))]
    ),
    "deeply nested": b"\x91" * 100_000,
    "an array of four thousand million": b"\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(MessageInvalid, match=f"^{len(data)} bytes are no message: "):
        read_from_engine(framed(data))


@given(st.binary(max_size=300))
def test_no_bytes_do_anything_but_be_refused(data: bytes) -> None:
    for read in (read_from_engine, read_to_engine):
        with pytest.raises(MessageInvalid):
            read(framed(data))


@given(st.data())
def test_a_message_with_a_wrong_byte_is_refused_or_another_message(data: st.DataObject) -> None:
    whole = bytearray(sent(data.draw(st.sampled_from(FROM_ENGINE)))[8:])
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = read_from_engine(framed(bytes(whole)))
    except MessageInvalid:
        return
    assert isinstance(message, Ready | Stepped | Died | Logged)


def test_a_frame_is_bounded_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MessageInvalid, match=f"limit {MAX_FRAME_BYTES}"):
        read_from_engine(io.BytesIO(b"\xff" * 8))
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 10)
    with pytest.raises(MessageInvalid, match="limit 10"):
        sent(FROM_ENGINE[1])


@pytest.mark.parametrize("what", [KeyError("x"), object()], ids=["foreign error", "foreign value"])
def test_nothing_foreign_is_sent(what: Any) -> None:
    with pytest.raises(TypeError, match=f"{type(what).__name__} .*travel"):
        sent(Stepped((Failed("a", what),), STATS))


def test_a_recipe_arrives_as_it_was(tmp_path: Path) -> None:
    odd = tmp_path / "odd\udcff.gguf"  # no UTF-8, as a file's name may be
    recipe = LlamaRecipe(odd, LoadOptions(n_ctx=7, adapters={"mail": odd}), EngineOptions(max_drafts=None))
    start = read_to_engine(io.BytesIO(sent(pack_recipe(recipe, {"deskside": 10}))))
    assert isinstance(start, Start)
    assert unpack_recipe(start) == recipe
    assert start.log_levels == {"deskside": 10}
