"""The incremental text equals the naive whole-text answer at any token boundaries."""

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.generation import TextStream
from tests.support.runtime.fakes import END_OF_TURN, FakeTokenizer


def pieces_of(data: bytes, stop: tuple[str, ...], sizes: list[int]) -> tuple[list[str], bool]:
    """The texts that the stream releases for `data` cut into tokens of these sizes."""
    cuts, at = [], 0
    for size in sizes:
        cuts.append(data[at : at + size])
        at += size
    cuts.append(data[at:])
    stream = TextStream(lambda token: cuts[token], stop)
    released = [stream.push(token) for token in range(len(cuts))]
    return [*released, stream.finish()], stream.stopped


def naive(text: str, stop: tuple[str, ...]) -> str:
    """Read character by character until a stop string is complete; the longest of those takes itself away."""
    for end in range(1, len(text) + 1):
        done = [s for s in stop if text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))]
    return text


@given(
    data=st.one_of(st.text().map(str.encode), st.binary(), st.text(alphabet="abü€😀").map(str.encode)),
    sizes=st.lists(st.integers(0, 5), max_size=40),
    stop=st.lists(st.text(alphabet="abü€😀", min_size=1, max_size=4), max_size=3).map(tuple),
)
@settings(max_examples=400)
def test_pieces_joined_are_the_naive_text(data: bytes, sizes: list[int], stop: tuple[str, ...]) -> None:
    whole = data.decode("utf-8", "replace")
    pieces, stopped = pieces_of(data, stop, sizes)
    assert "".join(pieces) == naive(whole, stop)
    assert stopped == any(s in whole for s in stop)


def test_a_character_waits_for_its_last_byte() -> None:
    assert pieces_of("€x".encode(), (), [1, 1, 1])[0] == ["", "", "€", "x", ""]


def test_half_a_character_at_the_end_is_replaced() -> None:
    assert "".join(pieces_of("a€".encode()[:-1], (), [1, 1])[0]) == "a\ufffd"


def test_a_possible_stop_is_held_back_and_released() -> None:
    assert pieces_of(b"ab\nUsex", ("\nUser",), [2, 1, 2, 1])[0] == ["ab", "", "", "", "\nUsex", ""]
    pieces, stopped = pieces_of(b"ab\nUser: no", ("\nUser",), [2, 1, 2, 2])
    assert ("".join(pieces), stopped) == ("ab", True)


def test_a_held_back_beginning_comes_out_at_the_end() -> None:
    assert pieces_of(b"ab\nUs", ("\nUser",), [])[0] == ["ab", "\nUs"]


def test_nothing_follows_a_stop() -> None:
    stream = TextStream(FakeTokenizer().token_bytes, ("b",))
    assert [stream.push(token) for token in b"abc"] == ["a", "", ""]
    assert stream.finish() == ""


def test_control_tokens_are_silent() -> None:
    stream = TextStream(FakeTokenizer().token_bytes)
    assert stream.push(ord("a")) + stream.push(END_OF_TURN) + stream.finish() == "a"


def test_the_work_per_token_does_not_grow() -> None:
    """Counts characters kept, not seconds: a stream never looks at released text again."""
    stream = TextStream(FakeTokenizer().token_bytes, ("xyz" * 5,))
    n_released = 0
    for n_pushed, token in enumerate(b"xy " * 1000, 1):
        n_released += len(stream.push(token))
        assert n_pushed - n_released < 15
