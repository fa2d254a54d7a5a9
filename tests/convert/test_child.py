"""Work in a process of its own: jobs go in, progress and complaints come out, and it never outlives its block."""

import signal

import pytest

from convert.child import Child, run_child

pytestmark = pytest.mark.usefixtures("fresh_children")

SAYS = "tests.support.convert.saying_child"


def test_progress_and_the_last_complaint_come_back() -> None:
    steps: list[tuple[int, int]] = []
    code, complaint = run_child(SAYS, {"say": ["1 2", "first", "2 2", "last"], "exit": 3}, lambda *s: steps.append(s))
    assert (code, complaint, steps) == (3, "last", [(1, 2), (2, 2)])


def test_a_second_job_is_waited_for() -> None:
    with Child(SAYS, {"say": ["one"], "more": True}) as child:
        assert not child.has_failed
        child.give({"say": ["two"], "exit": 0})
        assert child.wait(lambda *step: None) == (0, "two")
        assert not child.has_failed


def test_a_job_for_a_child_that_is_dead_is_told_by_its_exit() -> None:
    with Child(SAYS, {"say": ["gone"], "exit": 4}) as child:
        assert child.wait(lambda *step: None) == (4, "gone")
        child.give({"say": ["never"]})
        assert child.has_failed


def test_a_child_that_aborts_is_told_by_its_signal() -> None:
    code, complaint = run_child(SAYS, {"say": ["why"], "abort": True}, lambda *step: None)
    assert (code, complaint) == (-signal.SIGABRT, "why")


def test_what_ends_the_block_ends_the_child() -> None:
    with pytest.raises(KeyboardInterrupt), Child(SAYS, {"say": [], "more": True}) as child:
        raise KeyboardInterrupt
    assert child.has_failed
    child.close()
