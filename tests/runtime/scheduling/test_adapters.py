"""Adapters in the plan: each step is under one, no adapter starves, slots and cells go by arrival."""

from itertools import groupby

from runtime.scheduling.plan import STEP_TOKENS, TURN_TOKENS, ScheduledSequence, StepPlan

from .test_scheduler import Desk

# Others may take one whole turn between two steps of an adapter.
LONGEST_WAIT = TURN_TOKENS // STEP_TOKENS


class Office(Desk):
    """A desk that serves adapters."""

    def want(self, adapter: str | None, n_prompt: int, *, max_tokens: int = 50, shared: int = 0) -> ScheduledSequence:
        prompt = (*range(shared), *(1000 * (self.n + 1) + i for i in range(n_prompt - shared)))
        return self.add(prompt, max_tokens, adapter)

    def work(self) -> str | None:
        """One computed step; its adapter, which must be that of all of its chunks. Who is done leaves."""
        plan = self.plan()
        self.work_on(plan)
        return plan.adapter

    def work_on(self, plan: StepPlan) -> None:
        assert {chunk.sequence.adapter for chunk in plan.chunks} == {plan.adapter}
        self.scheduler.commit(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(7)
                if chunk.sequence.n_generated == chunk.sequence.max_tokens:
                    self.scheduler.finish(chunk.sequence)


def test_answers_under_different_adapters_are_written_in_turns() -> None:
    office = Office()
    for adapter in (None, "a", "b"):
        office.want(adapter, 10)
    served = [office.work() for _ in range(60)]
    runs = [(adapter, len(list(run))) for adapter, run in groupby(served)][:-1]
    assert [adapter for adapter, _ in runs] == [[None, "a", "b"][i % 3] for i in range(len(runs))]
    assert {length for _, length in runs} <= {LONGEST_WAIT - 1, LONGEST_WAIT}


def test_a_stream_of_arrivals_under_one_adapter_starves_no_other() -> None:
    office = Office(max_running=4, step_tokens=64)
    lone = office.want("lone", 200, max_tokens=40)
    served = []
    while lone in office.scheduler.running + office.scheduler.waiting:
        if len(office.scheduler.waiting) < 6:
            office.want("busy", 100, max_tokens=20)
        served.append(office.work())
    gaps = [len(list(run)) for adapter, run in groupby(served) if adapter == "busy"]
    assert max(gaps) <= LONGEST_WAIT
    assert served.count("lone") == 4 + 39


def test_who_comes_while_every_slot_is_taken_is_next_whatever_the_adapter() -> None:
    office = Office(max_running=2)
    for _ in range(2):
        office.want("busy", 10, max_tokens=9)
    lone = office.want("lone", 10)
    for _ in range(20):
        office.want("busy", 10, max_tokens=9)
    while lone.seq_id is None:
        office.work()
    assert [s.adapter for s in office.scheduler.running].count("lone") == 1
    assert len(office.scheduler.waiting) >= 18, "no later one overtook it"
    assert "lone" in {office.work() for _ in range(LONGEST_WAIT + 1)}


def test_under_one_adapter_everything_is_as_without() -> None:
    plans = []
    for adapter in (None, "only"):
        office = Office(n_cells=300, max_running=3, step_tokens=32)
        for n in range(8):
            office.want(adapter, 20 + n, shared=10, max_tokens=30)
        log = []
        while office.scheduler.running or office.scheduler.waiting:
            plan = office.plan()
            log.append((plan.edits, [(c.sequence.arrival, c.start, c.count, c.n_rows) for c in plan.chunks]))
            office.work_on(plan)
        plans.append(log)
    assert plans[0] == plans[1]


def test_a_prefix_is_held_back_for_and_copied_under_its_own_adapter_only() -> None:
    office = Office(max_running=8, step_tokens=100)
    first = {adapter: office.want(adapter, 90, shared=80) for adapter in ("a", "b")}
    second = {adapter: office.want(adapter, 90, shared=80) for adapter in ("a", "b")}
    computed = {"a": 0, "b": 0}
    for _ in range(2 * LONGEST_WAIT):
        plan = office.plan()
        assert plan.adapter is not None
        computed[plan.adapter] += sum(min(chunk.count, 90) for chunk in plan.chunks if chunk.count > 1)
        office.work_on(plan)
    assert computed == {"a": 100, "b": 100}
    assert [s.n_cached for s in first.values()] == [0, 0]
    assert [s.n_cached for s in second.values()] == [80, 80]


def test_without_cells_the_newest_of_all_gives_way_and_the_oldest_finishes() -> None:
    office = Office(n_cells=60, max_running=4)
    live = [office.want(("a", "b", None)[n % 3], 8, max_tokens=40) for n in range(6)]
    order = []
    for _ in range(3000):
        if not live:
            break
        office.work()
        for sequence in [s for s in live if s.n_generated == 40]:
            live.remove(sequence)
            order.append(sequence.arrival)
    assert sorted(order) == list(range(6))
    assert order[0] == 0
    assert office.scheduler.n_preemptions > 0
    office.cache.evict_idle()
    assert office.cache.used_cells == 0


def test_an_adapter_that_comes_again_comes_last() -> None:
    office = Office()
    gone = office.want("gone", 5)
    office.want("a", 5), office.want("b", 5)
    office.scheduler.drop(gone)
    office.want("gone", 5)
    assert [adapter for adapter, _ in groupby(office.work() for _ in range(10))] == ["a", "b", "gone"]


def test_a_failed_batch_is_taken_apart_under_its_own_adapter() -> None:
    office = Office()
    for adapter in ("a", "a", "b"):
        office.want(adapter, 5)
    plan = office.plan()
    assert office.scheduler.isolate(plan)
    alone = [office.plan()]
    office.work_on(alone[0])
    alone.append(office.plan())
    assert [(p.adapter, [c.sequence.arrival for c in p.chunks]) for p in alone] == [("a", [0]), ("a", [1])]
    office.scheduler.drop(alone[1].chunks[0].sequence)
    assert {office.work() for _ in range(2 * LONGEST_WAIT)} == {"a", "b"}


def test_a_step_that_found_no_room_is_tried_again_under_the_same_adapter() -> None:
    office = Office()
    office.want("a", 50)
    office.want("b", 50)
    plan = office.plan()
    assert office.scheduler.shrink(plan)
    again = office.plan()
    assert (plan.adapter, again.adapter, again.n_tokens) == ("a", "a", 25)
