"""The rotation of adapters: alone one always has the turn; together none waits longer than a turn of each other."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.scheduling.plan import STEP_TOKENS, TURN_TOKENS, AdapterRotation, StepKind


def turns(*adapters: str | None) -> AdapterRotation:
    made = AdapterRotation()
    for adapter in adapters:
        made.join(adapter)
    return made


def test_a_new_adapter_comes_last_and_one_without_sequences_is_forgotten() -> None:
    made = turns(None, "a", "a", "b")
    orders = [made.order]
    for _ in range(2):
        made.leave("a")
        orders.append(made.order)
    assert orders == [(None, "a", "b"), (None, "a", "b"), (None, "b")]


def test_a_turn_is_a_few_small_steps_or_one_large() -> None:
    made = turns("a", "b")
    for _ in range(TURN_TOKENS // STEP_TOKENS - 1):
        made.computed("a", 1, StepKind.ROWS)
        assert made.order == ("a", "b")
    made.computed("a", 1, StepKind.ROWS)
    assert made.order == ("b", "a")
    made.computed("b", TURN_TOKENS, StepKind.ROWS)
    assert made.order == ("a", "b")


def test_each_adapter_remembers_what_it_computed_last() -> None:
    made = turns("a", "b")
    made.computed("a", 500, StepKind.LONG)
    made.computed("b", 5, StepKind.ROWS)
    assert (made.kind("a"), made.kind("b")) == (StepKind.LONG, StepKind.ROWS)
    made.computed("a", 5, StepKind.ROWS)
    assert made.kind("a") is StepKind.ROWS


def test_who_is_passed_over_keeps_the_place() -> None:
    made = turns("a", "b", "c")
    made.computed("b", 500, StepKind.ROWS)
    assert made.order == ("a", "c", "b")


@given(st.lists(st.tuples(st.integers(1, 512), st.sampled_from([None, "a", "b"])), min_size=40, max_size=120))
def test_everyone_with_work_computes_within_a_turn_of_each_other(steps: list[tuple[int, str | None]]) -> None:
    """Sequences come and go all the time; the first in order computes."""
    made = turns(None, "a", "b")
    waits: dict[str | None, int] = dict.fromkeys(made.order, 0)
    for n_tokens, other in steps:
        made.join(other)
        now = made.order[0]
        made.computed(now, n_tokens, StepKind.ROWS)
        waits = {adapter: 0 if adapter == now else wait + 1 for adapter, wait in waits.items()}
        assert max(waits.values()) <= 2 * (TURN_TOKENS // STEP_TOKENS)
        made.leave(other)
