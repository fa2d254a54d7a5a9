"""Prompt lookup against a search through all tokens, and what it learns of its own guesses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.prompt_lookup import ANSWER_MEMORY, LONGEST, SHORTEST, Acceptance, Drafter, Lookup


def searched(tokens: list[int], count: int) -> tuple[tuple[int, ...], int]:
    """The definition, by brute force."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for start in range(len(tokens) - 1, n - 1, -1):
            if tokens[start - n : start] == tokens[-n:] and len(tokens) > n:
                text = list(tokens)
                for place in range(count):
                    text.append(text[start + place])
                return tuple(text[len(tokens) :]), n
    return (), 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=8), st.integers(0, 9))
def test_it_finds_what_a_search_through_all_tokens_finds(pieces: list[list[int]], count: int) -> None:
    lookup, tokens = Lookup(), list[int]()
    for piece in pieces:
        tokens += piece
        assert lookup.propose(tokens, count) == searched(tokens, count)


def test_the_longest_then_the_latest_occurrence_counts() -> None:
    assert Lookup().propose([1, 2, 3, 10, 2, 3, 11, 7, 2, 3], 2) == ((11, 7), 2)
    assert Lookup().propose([1, 2, 3, 10, 2, 3, 11, 1, 2, 3], 2) == ((10, 2), 3)


def test_a_repetition_is_guessed_to_go_on() -> None:
    assert Lookup().propose([9, 4, 5, 4, 5, 4], 5) == ((5, 4, 5, 4, 5), 3)


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4, 5], [1, 2, 3, 1]])
def test_nothing_known_is_no_guess(tokens: list[int]) -> None:
    assert Lookup().propose(tokens, 5) == ((), 0)


def test_each_token_is_read_once() -> None:
    """Reading a long prompt again at every token would cost more than the drafts bring."""

    class Counting(list[int]):
        n_slices = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            Counting.n_slices += isinstance(key, slice)
            return super().__getitem__(key)

    lookup, tokens = Lookup(), Counting(range(1000))
    lookup.propose(tokens, 3)
    first, Counting.n_slices = Counting.n_slices, 0
    for token in range(10):
        tokens.append(token + 5000)
        lookup.propose(tokens, 3)
    assert first >= 1900
    assert Counting.n_slices <= 10 * 4


def test_acceptance_follows_the_latest_and_each_length_has_its_own() -> None:
    acceptance = Acceptance(ANSWER_MEMORY)
    start = acceptance.rate(3)
    acceptance.note(3, right=100, wrong=0)
    assert acceptance.rate(3) > 0.95
    assert acceptance.rate(2) == start
    for _ in range(40):
        acceptance.note(3, right=0, wrong=1)
    assert acceptance.rate(3) < 0.05


def test_an_answer_begins_from_what_all_answers_taught() -> None:
    everyone = Acceptance(200)
    first = Drafter(everyone)
    for _ in range(50):
        first.look_up([1, 2, 3, 8, 1, 2, 3], 4)
        first.judge([8])
    second = Drafter(everyone)
    second.look_up([5, 6, 7, 9, 5, 6, 7], 4)
    assert second.rate == pytest.approx(everyone.rate(3))
    assert second.rate > 0.9


@pytest.mark.parametrize(
    ("drawn", "better"),
    [([8], True), ([8, 1, 2], True), ([7], False), ([8, 1, 2, 3, 9], True)],
    ids=["the first", "three", "none", "all, and one beyond the guess"],
)
def test_a_guess_is_judged_by_what_was_drawn_whether_verified_or_not(drawn: list[int], better: bool) -> None:
    drafter = Drafter(Acceptance(200))
    drafter.look_up([1, 2, 3, 8, 1, 2, 3], 4)
    assert list(drafter.guess) == [8, 1, 2, 3]
    before = drafter.rate
    drafter.judge(drawn)
    assert (drafter.rate > before) == better
    assert not drafter.guess
    after = drafter.rate
    drafter.judge([8])
    assert drafter.rate == after, "a guess is judged once"
