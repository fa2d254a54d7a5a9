"""Rows and prompts: one step for both while that is cheap, else in turns in which neither waits for more than one."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.engine import Engine
from runtime.engine.options import MIX_CELLS, EngineOptions
from runtime.requests import Request, SamplingParams
from runtime.scheduling.plan import ScheduledSequence, StepPlan
from runtime.scheduling.scheduler import FEW_TOKENS, TILE_TOKENS
from tests.runtime.engine.test_engine import run
from tests.support.runtime.fakes import FakeLlama

from .test_adapters import Office
from .test_scheduler import Desk


def writing(desk: Desk, n_prompt: int, *, shared: int = 0) -> ScheduledSequence:
    """An answer that is being written."""
    sequence = desk.ask(n_prompt, shared=shared)
    while sequence.n_generated == 0:
        desk.step()
    return sequence


def test_rows_and_a_long_prompt_take_turns() -> None:
    desk = Desk(mix_cells=0)
    writing(desk, 80)
    desk.ask(290)
    steps = [desk.step() for _ in range(6)]
    assert steps == [[(0, 1)], [(1, 99)], [(0, 1)], [(1, 99)], [(0, 1)], [(1, 92)]]
    assert desk.step() == [(0, 1), (1, 1)], "the prompt is an answer now"


def test_a_prompt_that_comes_while_rows_are_decoded_is_next() -> None:
    desk = Desk(mix_cells=0)
    writing(desk, 80)
    desk.step()
    desk.ask(250)
    assert [desk.step() for _ in range(2)] == [[(1, 99)], [(0, 1)]]


@pytest.mark.parametrize(("mix_cells", "step"), [(79, [(0, 1)]), (80, [(0, 1), (1, 99)]), (None, [(0, 1), (1, 99)])])
def test_up_to_the_bound_on_the_rows_cells_one_step_does_both(
    mix_cells: int | None, step: list[tuple[int, int]]
) -> None:
    desk = Desk(mix_cells=mix_cells)
    writing(desk, 80)
    desk.ask(250)
    assert desk.step() == step


def test_cells_that_rows_share_count_once() -> None:
    desk = Desk(mix_cells=110)
    for _ in range(2):
        writing(desk, 90, shared=80)
    assert desk.cache.cells_held([0, 1]) == 101
    desk.ask(250)
    assert desk.step() == [(0, 1), (1, 1), (2, 98)]


def test_a_step_smaller_than_a_tile_always_does_both() -> None:
    for n_prompt, step in ((TILE_TOKENS - 2, [(0, 1), (1, TILE_TOKENS - 2)]), (TILE_TOKENS - 1, [(0, 1)])):
        desk = Desk(mix_cells=0)
        writing(desk, 80)
        desk.ask(n_prompt)
        assert desk.step() == step


@pytest.mark.parametrize(("n_forced", "beside"), [(FEW_TOKENS - 1, "rows"), (FEW_TOKENS, "prompts")])
def test_a_few_tokens_more_are_rows_still(n_forced: int, beside: str) -> None:
    desk = Desk(mix_cells=0, step_tokens=200)
    answer = writing(desk, 80)
    writing(desk, 80)
    answer.tokens.extend([8] * n_forced)
    desk.ask(400)
    rows, prompts = desk.step(), desk.step()
    assert (0 in dict(rows), 0 in dict(prompts)) == (beside == "rows", beside == "prompts")
    assert (1 in dict(rows), 2 in dict(prompts)) == (True, True)


def test_one_that_joins_with_little_to_compute_joins_the_rows() -> None:
    desk = Desk(mix_cells=0, step_tokens=300, idle_cells=500)
    desk.scheduler.finish(writing(desk, 90, shared=80))
    writing(desk, 90)
    desk.ask(250)
    desk.ask(90, shared=80)
    assert [desk.step() for _ in range(2)] == [[(1, 1), (3, 10)], [(2, 250)]]


def test_what_rows_leave_over_is_spare_though_a_prompt_waits() -> None:
    desk = Desk(mix_cells=0)
    writing(desk, 80)
    desk.ask(250)
    assert desk.scheduler.spare(desk.plan()) == 99
    desk.step()
    assert desk.scheduler.spare(desk.plan()) == 0


def test_each_adapter_has_turns_of_its_own() -> None:
    office = Office(n_cells=4000, max_running=4, mix_cells=0)
    for adapter in ("a", "b"):
        office.want(adapter, 80)
    for _ in range(2):
        office.work()
    prompts = [office.want(adapter, 500) for adapter in ("a", "b")]
    for _ in range(40):
        office.work()
    assert [prompt.n_computed >= 500 for prompt in prompts] == [True, True]


def test_with_next_to_no_cells_left_the_oldest_still_finishes_first() -> None:
    desk = Desk(n_cells=160, mix_cells=0)
    live = [desk.ask(70, max_tokens=60) for _ in range(4)]
    order = []
    for _ in range(2000):
        if not live:
            break
        desk.step()
        for sequence in [s for s in live if s.n_generated >= 60]:
            desk.scheduler.finish(sequence)
            live.remove(sequence)
            order.append(sequence.arrival)
    assert order == [0, 1, 2, 3]
    assert desk.scheduler.n_preemptions > 0


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 400), st.integers(1, 20), st.sampled_from([None, "a"])),
    min_size=1,
    max_size=20,
)


@given(arrivals=ARRIVALS, mix_cells=st.sampled_from([0, 100, 300]))
def test_neither_sort_waits_for_more_than_one_step_of_the_other(
    arrivals: list[tuple[int, int, int, str | None]], mix_cells: int
) -> None:
    """Of the prompts, the first: the others wait. Cells suffice, so no sequence is pre-empted."""
    office = Office(n_cells=8 * 420, step_tokens=128, max_running=8, mix_cells=mix_cells)
    missed: dict[int, int] = defaultdict(int)
    for n_steps, n_prompt, max_tokens, adapter in arrivals:
        office.want(adapter, n_prompt, max_tokens=max_tokens)
        for _ in range(n_steps):
            watched_step(office, missed, mix_cells)
    while office.scheduler.running or office.scheduler.waiting:
        watched_step(office, missed, mix_cells)
    assert office.scheduler.n_preemptions == 0


def watched_step(office: Office, missed: dict[int, int], mix_cells: int) -> None:
    """One step, if there is work. `missed` counts by arrival the steps of its own adapter that went by without one."""
    plan = office.scheduler.plan()
    if plan is None:
        return
    assert_one_sort(office, plan, mix_cells)
    mine = [sequence for sequence in office.scheduler.running if sequence.adapter == plan.adapter]
    first_prompt = [sequence for sequence in mine if not is_row(sequence)][:1]
    for sequence in [*filter(is_row, mine), *first_prompt]:
        missed[sequence.arrival] += 1
    for chunk in plan.chunks:
        missed[chunk.sequence.arrival] = 0
    assert max(missed.values()) <= 1
    office.work_on(plan)


def is_row(sequence: ScheduledSequence) -> bool:
    return len(sequence.tokens) - sequence.n_computed <= FEW_TOKENS


def assert_one_sort(office: Office, plan: StepPlan, mix_cells: int) -> None:
    rows = [chunk.sequence.seq_id for chunk in plan.chunks if is_row(chunk.sequence) and chunk.start]
    prompts = [chunk for chunk in plan.chunks if not is_row(chunk.sequence)]
    held = office.cache.cells_held([seq_id for seq_id in rows if seq_id is not None])
    assert not (rows and prompts) or held <= mix_cells or plan.n_tokens < TILE_TOKENS


@pytest.mark.parametrize(("gpu_layers", "mixed"), [(0, False), (-1, True), (7, True)])
def test_on_a_gpu_one_step_does_both(gpu_layers: int, mixed: bool) -> None:
    llama = FakeLlama(n_ctx=2048, script="an answer")
    llama.info = replace(llama.info, gpu_layers=gpu_layers)
    engine = Engine(llama, EngineOptions(step_tokens=128))
    engine.add(Request("first", tuple(range(200)) * 4, SamplingParams(9, temperature=0)))
    while len(llama.batches) < 8:
        engine.step()
    engine.add(Request("second", (7,) * 300, SamplingParams(9, temperature=0)))
    run(engine)
    sizes = [(len(batch.tokens), len(set(batch.seq_ids.tolist()))) for batch in llama.batches]
    assert any(n_tokens >= TILE_TOKENS and n_sequences > 1 for n_tokens, n_sequences in sizes) == mixed


def test_the_bound_is_what_was_measured_unless_an_option_says_otherwise() -> None:
    assert [EngineOptions().mix_bound(layers) for layers in (0, -1)] == [MIX_CELLS, None]
    assert [EngineOptions(mix_cells=9).mix_bound(layers) for layers in (0, -1)] == [9, 9]
