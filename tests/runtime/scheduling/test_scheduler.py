"""The policy, step by step: who is planned, in what order, and what gives way when cells run out."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from runtime.kv_cache.prefix_cache import PrefixCache, Remove
from runtime.requests import Event
from runtime.scheduling.plan import Chunk, ScheduledSequence, StepPlan
from runtime.scheduling.scheduler import HOLD_BACK_TOKENS, Scheduler


class NoOwner:
    """The scheduler has no dealings with the owners of its sequences."""

    def advance(self, chunk: Chunk, logits: np.ndarray) -> Iterable[Event]:
        raise AssertionError

    def drop(self, request_id: str) -> None:
        raise AssertionError


class Desk:
    """A scheduler with its cache, and a stand-in for the engine's part in the protocol."""

    def __init__(
        self,
        n_cells: int = 1000,
        step_tokens: int = 100,
        max_running: int = 4,
        cut_limit: int | None = 1000,
    ) -> None:
        self.cache = PrefixCache(n_cells, max_running + 2, cut_limit)
        self.scheduler = Scheduler(self.cache, step_tokens=step_tokens, max_running=max_running)
        self.n = 0

    def ask(self, n_prompt: int, *, max_tokens: int = 50, shared: int = 0) -> ScheduledSequence:
        """A request whose prompt is its own but for the first `shared` tokens."""
        prompt = (*range(shared), *(1000 * (self.n + 1) + i for i in range(n_prompt - shared)))
        return self.add(prompt, max_tokens)

    def add(self, prompt: tuple[int, ...], max_tokens: int, adapter: str | None = None) -> ScheduledSequence:
        sequence = ScheduledSequence(NoOwner(), str(self.n), self.n, list(prompt), len(prompt), max_tokens, adapter)
        self.n += 1
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        return plan

    def step(self) -> list[tuple[int, int]]:
        """One computed step; (arrival, tokens) of its chunks. Who is sampled writes a token."""
        plan = self.plan()
        self.scheduler.commit(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(7)
        return [(chunk.sequence.arrival, chunk.count) for chunk in plan.chunks]


def test_nothing_to_do_is_no_plan() -> None:
    assert Desk().scheduler.plan() is None


def test_prompts_are_prefilled_in_chunks_one_by_one_first_come_first_served() -> None:
    desk = Desk(step_tokens=100)
    desk.ask(150), desk.ask(30), desk.ask(60)
    assert [desk.step() for _ in range(2)] == [[(0, 100)], [(0, 50)]]
    assert desk.step() == [(0, 1)]
    assert desk.step() == [(1, 30)]
    assert desk.step() == [(0, 1), (1, 1)]
    assert desk.step() == [(2, 60)]


def test_answers_and_prompts_take_turns() -> None:
    desk = Desk(step_tokens=20)
    desk.ask(5)
    desk.step()
    desk.ask(90)
    assert [desk.step() for _ in range(4)] == [[(0, 1)], [(1, 20)], [(0, 1)], [(1, 20)]]


def test_short_ends_of_prompts_are_computed_together_and_filled_up() -> None:
    desk = Desk()
    desk.ask(10), desk.ask(4), desk.ask(7)
    plan = desk.plan()
    assert [(chunk.count, chunk.n_pad) for chunk in plan.chunks] == [(10, 0), (4, 6), (7, 3)]


def test_chunks_are_filled_up_to_whole_groups_of_rows_within_a_step() -> None:
    desk = Desk()
    desk.scheduler = Scheduler(desk.cache, step_tokens=100, max_running=4, row_group=16)
    long, *_ = desk.ask(150), desk.ask(4), desk.ask(7)
    plan = desk.plan()
    assert [(chunk.count, chunk.n_pad) for chunk in plan.chunks] == [(96, 0)], "100 holds six groups"
    desk.scheduler.commit(plan)
    plan = desk.plan()
    assert [(chunk.count, chunk.n_pad) for chunk in plan.chunks] == [(4, 12), (7, 9)]
    desk.scheduler.commit(plan)
    for chunk in plan.chunks:
        chunk.sequence.tokens.append(7)
    assert [(chunk.count, chunk.n_pad) for chunk in desk.plan().chunks] == [(1, 0), (1, 0)]
    desk.scheduler.commit(desk.plan())
    assert [(chunk.count, chunk.n_pad) for chunk in desk.plan().chunks] == [(54, 10)]
    assert long.n_computed == 96


def test_one_much_longer_than_the_others_is_computed_alone() -> None:
    desk = Desk()
    desk.ask(3), desk.ask(15), desk.ask(4)
    assert desk.step() == [(0, 3), (2, 4)]
    assert desk.step() == [(0, 1), (2, 1)]
    assert desk.step() == [(1, 15)]


@pytest.mark.parametrize("n_prompt", range(1, 60))
@pytest.mark.parametrize("step_tokens", [3, 4, 16])
def test_no_token_of_a_prompt_is_computed_alone(n_prompt: int, step_tokens: int) -> None:
    desk = Desk(step_tokens=step_tokens)
    sequence = desk.ask(n_prompt)
    sizes = []
    while sequence.n_computed < n_prompt:
        sizes += [count for _, count in desk.step()]
    assert sum(sizes) == n_prompt
    assert min(sizes) > 1 or sizes == [1] == [n_prompt]


def test_what_follows_a_prompt_is_computed_again_in_the_chunks_in_which_it_came() -> None:
    desk = Desk(n_cells=200)
    sequence = desk.ask(20)
    desk.step()
    sizes = []
    for forced in ([], [8, 8, 8], [], [9] * 20):
        sequence.tokens += forced
        sizes += [count for _, count in desk.step()]
    assert sizes == [1, 4, 1, 21]
    assert sequence.seq_id is not None
    desk.scheduler.lose(sequence.seq_id)
    again: list[int] = []
    while len(again) < 5:
        again += [count for _, count in desk.step()]
    assert again == [20, *sizes]


def test_beyond_the_limit_a_prompt_is_cut_where_another_can_copy_it() -> None:
    desk = Desk(cut_limit=50)
    first, second = desk.ask(190, shared=150), desk.ask(190, shared=150)
    sizes = [desk.step() for _ in range(3)]
    assert sizes[:2] == [[(0, 100)], [(0, 28)]], "at a multiple of 64"
    assert (first.n_cached, second.n_cached) == (0, 128)


def test_only_the_last_token_of_what_is_known_is_sampled() -> None:
    desk = Desk(step_tokens=10)
    desk.ask(15)
    assert [chunk.samples for chunk in desk.plan().chunks] == [False]
    desk.step()
    assert [(chunk.start, chunk.count, chunk.samples) for chunk in desk.plan().chunks] == [(10, 5, True)]


def test_slots_bound_who_runs_and_the_next_joins_when_one_leaves() -> None:
    desk = Desk(max_running=2)
    first, _, third = desk.ask(5), desk.ask(5), desk.ask(5)
    assert [arrival for arrival, _ in desk.step()] == [0, 1]
    desk.scheduler.finish(first)
    assert [arrival for arrival, _ in [*desk.step(), *desk.step()]] == [1, 2]
    assert third.seq_id is not None


def test_a_new_one_waits_until_its_tokens_fit() -> None:
    desk = Desk(n_cells=100)
    first = desk.ask(60, max_tokens=30)
    desk.ask(50)
    desk.step()
    assert desk.step() == [(0, 1)]
    desk.scheduler.finish(first)
    assert desk.step() == [(1, 50)]


def test_nobody_overtakes_one_that_waits_for_cells() -> None:
    desk = Desk(n_cells=100)
    desk.ask(60, max_tokens=30)
    desk.step()
    desk.ask(50), desk.ask(2)
    assert desk.step() == [(0, 1)]


def test_without_cells_the_newest_is_preempted_and_comes_back() -> None:
    desk = Desk(n_cells=40)
    old, new = desk.ask(10, max_tokens=30), desk.ask(10, max_tokens=30)
    while desk.scheduler.n_preemptions == 0:
        desk.step()
    assert (old.seq_id is not None, new.seq_id, new.n_computed) == (True, None, 0)
    kept = list(new.tokens)
    while old.n_generated < 30:
        desk.step()
    desk.scheduler.finish(old)
    assert desk.step() == [(1, 10)]
    assert [desk.step() for _ in range(len(kept) - 10)] == [[(1, 1)]] * (len(kept) - 10), "as they were written"
    assert new.tokens[: len(kept)] == kept


def test_one_that_was_preempted_does_not_wait_for_itself() -> None:
    desk = Desk(n_cells=120)
    old = desk.ask(50, max_tokens=30)
    new = desk.ask(50, max_tokens=30)
    while desk.scheduler.n_preemptions == 0:
        desk.step()
    desk.scheduler.finish(old)
    assert [arrival for arrival, _ in desk.step()] == [new.arrival]


def test_a_full_cache_still_lets_the_oldest_finish() -> None:
    desk = Desk(n_cells=40, max_running=4)
    live = [desk.ask(8, max_tokens=32) for _ in range(6)]
    order = []
    for _ in range(1000):
        if not live:
            break
        desk.step()
        for sequence in [s for s in live if s.n_generated >= 32]:
            desk.scheduler.finish(sequence)
            live.remove(sequence)
            order.append(sequence.arrival)
    assert order == sorted(order)
    assert len(order) == 6


def test_a_shared_prefix_is_copied_and_the_rest_computed() -> None:
    desk = Desk()
    first = desk.ask(60, shared=50)
    desk.step()
    desk.scheduler.finish(first)
    second = desk.ask(70, shared=50)
    plan = desk.plan()
    assert plan.edits == (Remove(0, 50),), "the stream is taken over"
    assert [(c.start, c.count) for c in plan.chunks] == [(50, 20)]
    assert second.n_cached == 50


def test_the_whole_prompt_known_still_computes_its_last_two_tokens() -> None:
    desk = Desk()
    desk.scheduler.finish(_written(desk, desk.ask(40, shared=40)))
    again = desk.ask(40, shared=40)
    assert [(c.start, c.count, c.samples) for c in desk.plan().chunks] == [(38, 2, True)]
    assert again.n_cached == 38


def _written(desk: Desk, sequence: ScheduledSequence) -> ScheduledSequence:
    desk.step()
    return sequence


def test_arrivals_with_one_new_prefix_compute_it_once() -> None:
    desk = Desk(step_tokens=100, max_running=8)
    together = [desk.ask(90, shared=80) for _ in range(5)]
    assert desk.step() == [(0, 90)]
    assert desk.step() == [(n, 10) for n in range(1, 5)]
    assert [s.n_cached for s in together] == [0, 80, 80, 80, 80]


def test_others_overtake_one_that_is_held_back_but_not_for_ever() -> None:
    desk = Desk(step_tokens=100)
    desk.ask(190, shared=180)
    held, other = desk.ask(190, shared=180), desk.ask(5)
    assert desk.step() == [(0, 100)]
    assert desk.step() == [(2, 5)]
    assert desk.step() == [(2, 1)]
    assert desk.step() == [(0, 90)]
    assert desk.step() == [(1, 10)]
    assert (held.n_cached, other.n_cached) == (180, 0)


def test_a_short_common_beginning_is_not_waited_for() -> None:
    desk = Desk()
    for _ in range(2):
        desk.ask(40, shared=HOLD_BACK_TOKENS - 1)
    assert desk.step() == [(0, 40)]
    assert len(desk.scheduler.running) == 2


def test_no_room_in_the_real_cache_evicts_then_halves_then_preempts() -> None:
    desk = Desk()
    desk.scheduler.finish(_written(desk, desk.ask(20)))
    desk.ask(8), desk.ask(8)
    plan = desk.plan()
    assert desk.scheduler.shrink(plan)
    plan = desk.plan()
    assert (plan.edits, plan.n_tokens) == ((Remove(0),), 16)
    sizes = []
    while desk.scheduler.shrink(plan) and desk.scheduler.n_preemptions == 0:
        plan = desk.plan()
        sizes.append(plan.n_tokens)
    assert sizes == [8, 4, 2, 1]
    assert [c.sequence.arrival for c in desk.plan().chunks] == [1], "the older goes on alone"


def test_a_single_token_that_finds_no_room_cannot_be_helped() -> None:
    desk = Desk()
    desk.ask(1)
    assert not desk.scheduler.shrink(desk.plan())


def test_after_success_steps_grow_again() -> None:
    desk = Desk(step_tokens=64)
    desk.ask(500)
    desk.scheduler.shrink(desk.plan())
    assert [desk.step()[0][1] for _ in range(3)] == [32, 64, 64]


def test_what_a_decoding_step_leaves_over_is_spare_and_a_prefilling_one_leaves_nothing() -> None:
    desk = Desk(n_cells=40, step_tokens=20)
    desk.scheduler.finish(_written(desk, desk.ask(5)))
    desk.ask(8), desk.ask(8)
    assert desk.scheduler.spare(desk.plan(), 100) == 0
    desk.step()
    assert desk.scheduler.spare(desk.plan(), 100) == 40 - (5 + 8 + 8) - 2, "free cells, the idle prefix left alone"
    desk = Desk(step_tokens=20)
    for _ in range(2):
        desk.ask(8)
    desk.step()
    assert desk.scheduler.spare(desk.plan(), 100) == 20 - 2
    desk.scheduler.shrink(desk.plan())
    desk.scheduler.shrink(desk.plan())
    assert desk.scheduler.spare(desk.plan(), 100) == 0


def test_rows_bound_what_is_spare() -> None:
    desk = Desk(step_tokens=100)
    desk.ask(8), desk.ask(8)
    desk.step()
    assert desk.scheduler.spare(desk.plan(), 6) == 4


def test_nothing_is_spare_while_a_guilty_one_is_looked_for() -> None:
    desk = Desk()
    for _ in range(3):
        desk.ask(5)
    desk.step()
    desk.scheduler.isolate(desk.plan())
    assert desk.scheduler.spare(desk.plan(), 100) == 0


def test_trimming_takes_back_cells_and_finishing_trims_to_what_was_written() -> None:
    desk = Desk()
    sequence = desk.ask(10)
    desk.step()
    plan = desk.plan()
    [chunk] = plan.chunks
    drafted = replace(chunk, count=5, n_rows=5, drafts=(8, 8, 8, 8))
    desk.scheduler.commit(replace(plan, chunks=(drafted,)))
    assert (sequence.n_computed, desk.cache.used_cells) == (15, 15)
    desk.scheduler.trim(sequence, 13)
    desk.scheduler.trim(sequence, 14)
    assert (sequence.n_computed, desk.cache.used_cells) == (13, 13)
    assert sequence.cuts == [11, 12, 13], "rows, to be computed again as such"
    desk.scheduler.finish(sequence)
    assert desk.cache.used_cells == 10, "its prompt"
    assert desk.cache.take_edits() == (Remove(0, 13), Remove(0, 10))


def test_a_failed_batch_is_taken_apart() -> None:
    desk = Desk()
    sequences = [desk.ask(5), desk.ask(6), desk.ask(7)]
    assert desk.scheduler.isolate(desk.plan())
    assert desk.step() == [(0, 5)]
    guilty = desk.plan()
    assert [c.sequence for c in guilty.chunks] == [sequences[1]]
    assert desk.scheduler.isolate(guilty), "once may be an accident"
    guilty = desk.plan()
    assert [c.sequence for c in guilty.chunks] == [sequences[1]]
    assert not desk.scheduler.isolate(guilty)
    desk.scheduler.drop(sequences[1])
    assert desk.step() == [(2, 7)]
    assert desk.step() == [(0, 1), (2, 1)]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_dropping_frees_everything_wherever_it_is(steps: int) -> None:
    desk = Desk(max_running=1, step_tokens=10)
    running, waiting = desk.ask(15), desk.ask(15)
    for _ in range(steps):
        desk.step()
    desk.scheduler.drop(running)
    desk.scheduler.drop(waiting)
    assert desk.cache.used_cells == 0
    assert desk.scheduler.plan() is None
