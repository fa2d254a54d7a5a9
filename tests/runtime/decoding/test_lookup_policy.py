"""The price of drafts: what is fitted to step times, and how many drafts are worth theirs."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.prompt_lookup import (
    FORGET_STEPS,
    GUESSED_SLOPE,
    MAX_DELAY,
    NO_CANDIDATE,
    WORTH,
    DraftCandidate,
    StepTime,
    StepTimes,
    draft_lengths,
)

# Gemma 3 270M on two cores: 22 ms a step and 4 ms for every row more.
CPU = StepTime(0.018, 0.004)
FREE_ROWS = StepTime(0.02, 0.0)


def measured(*steps: tuple[int, float]) -> StepTime:
    times = StepTimes()
    for rows, seconds in steps:
        times.note(rows, seconds)
    fit = times.fit()
    assert fit is not None
    return fit


def test_before_any_step_nothing_is_known() -> None:
    assert StepTimes().fit() is None


def test_with_one_size_seen_a_row_costs_the_guessed_part() -> None:
    fit = measured(*[(1, 0.1)] * 20)
    assert fit.of(1) == pytest.approx(0.1)
    assert fit.of(2) == pytest.approx(0.1 * (1 + GUESSED_SLOPE))


def test_steps_of_several_sizes_give_their_line() -> None:
    fit = measured(*[(rows, CPU.of(rows)) for rows in (1, 2, 4, 8, 16)] * 9)
    assert all(fit.of(rows) == pytest.approx(CPU.of(rows), rel=0.02) for rows in range(1, 17))


def test_a_size_that_is_measured_often_is_believed_more_than_the_line() -> None:
    """Kernels work in tiles: five rows may take as long as eight."""
    fit = measured(*[(1, 0.02), (4, 0.03), (5, 0.05), (8, 0.05)] * 9)
    assert fit.of(5) == pytest.approx(0.05, rel=0.1)
    assert fit.of(4) == pytest.approx(0.03, rel=0.1)


def test_a_step_that_the_machine_disturbed_does_not_matter() -> None:
    fit = measured(*[(1, 0.02), (2, 0.024), (1, 0.02)] * 5, (1, 3.0), (2, 2.0))
    assert fit.of(2) == pytest.approx(0.024, rel=0.02)


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(0, 10)), min_size=1, max_size=60))
def test_no_row_and_no_step_takes_negative_time(steps: list[tuple[int, float]]) -> None:
    fit = measured(*steps)
    assert fit.row_s >= 0
    assert fit.of(0) >= -1e-9
    assert all(fit.of(rows) > 0 for rows in range(1, 65))


def test_what_was_dear_once_is_forgotten() -> None:
    times = StepTimes()
    times.note(2, 9.0)
    for _ in range(FORGET_STEPS):
        times.note(1, 0.1)
    fit = times.fit()
    assert fit is not None
    assert fit.of(2) == pytest.approx(0.1 * (1 + GUESSED_SLOPE))


def expected(candidate: DraftCandidate, length: int) -> float:
    return sum(candidate.rate**k for k in range(length + 1))


candidates = st.lists(
    st.one_of(st.just(NO_CANDIDATE), st.builds(DraftCandidate, st.floats(0, 1), st.integers(0, 3))),
    min_size=1,
    max_size=3,
)


@given(candidates, st.integers(0, 9), st.builds(StepTime, st.floats(0.001, 0.1), st.floats(0, 0.05)))
def test_it_is_the_best_of_all_ways_to_share_out(rows: list[DraftCandidate], spare: int, time: StepTime) -> None:
    def speed(lengths: tuple[int, ...]) -> float:
        tokens = sum(expected(row, length) for row, length in zip(rows, lengths, strict=True))
        return tokens / time.of(len(rows) + sum(lengths))

    none = (0,) * len(rows)
    shares = product(*(range(row.count + 1) for row in rows))
    patient = [
        lengths
        for lengths in shares
        if sum(lengths) <= spare and time.of(len(rows) + sum(lengths)) <= MAX_DELAY * time.of(len(rows))
    ]
    got = tuple(draft_lengths(rows, spare, time))
    assert got in patient or all(got)
    best = max(speed(lengths) for lengths in patient)
    assert speed(got) >= best * (1 - 1e-9) or (got == none and best <= WORTH * speed(none) * (1 + 1e-9))


@pytest.mark.parametrize(
    ("rate", "time", "length"),
    [
        (0.95, CPU, 11),
        (0.7, CPU, 3),
        (0.15, CPU, 0),
        (0.95, FREE_ROWS, 15),
        (0.15, FREE_ROWS, 15),
        (0.01, FREE_ROWS, 0),
        (0.95, StepTime(0.0, 0.02), 0),
    ],
)
def test_one_answer_gets_as_many_as_pay(rate: float, time: StepTime, length: int) -> None:
    assert draft_lengths([DraftCandidate(rate, 15)], 31, time) == [length]


def test_a_full_batch_gets_fewer_each_than_one_alone() -> None:
    many = draft_lengths([DraftCandidate(0.8, 15)] * 16, 100, CPU)
    assert max(many) < draft_lengths([DraftCandidate(0.8, 15)], 100, CPU)[0]


def test_who_gets_no_drafts_waits_little_longer_for_those_of_others() -> None:
    company = [DraftCandidate(1.0, 15)] + [NO_CANDIDATE] * 7
    lengths = draft_lengths(company, 24, CPU)
    assert lengths[0] > 0
    assert CPU.of(8 + sum(lengths)) <= MAX_DELAY * CPU.of(8)
    assert draft_lengths([DraftCandidate(1.0, 15)] * 8, 24, CPU) == [3] * 8
    alone = [DraftCandidate(1.0, 15)]
    assert draft_lengths(alone, 24, CPU)[0] > draft_lengths(alone, 24, CPU, others_wait=True)[0] == 1


def test_what_is_not_there_is_not_given() -> None:
    assert draft_lengths([DraftCandidate(1.0, 2), DraftCandidate(1.0, 0)], 24, FREE_ROWS) == [2, 0]
    assert draft_lengths([DraftCandidate(1.0, 9)], 3, FREE_ROWS) == [3]
    assert draft_lengths([DraftCandidate(1.0, 9)], 0, FREE_ROWS) == [0]
