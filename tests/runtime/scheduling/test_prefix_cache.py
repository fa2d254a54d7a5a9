"""The cache against a plain model of a cache that really holds tokens, and its rules one by one."""

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.llama.interface import Batch
from runtime.scheduling.plan import Copy, Match, Remove
from runtime.scheduling.prefix_cache import PrefixCache
from runtime.scheduling.radix_tree import common_prefix
from tests.support.runtime.fakes import FakeLlama

N_CELLS, N_IDS = 40, 5


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def resident(cache: PrefixCache, text: str) -> int:
    """A running sequence that holds all of `text`."""
    match = cache.match(ids(text))
    seq_id = cache.admit(ids(text), match)
    assert seq_id is not None
    assert cache.make_room(len(text) - match.length) == len(text) - match.length
    cache.extend(seq_id, len(text) - match.length)
    return seq_id


def test_the_longest_prefix_is_found_and_the_last_token_left() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, N_CELLS)
    short, long = resident(cache, "abc"), resident(cache, "abcdef")
    assert cache.match(ids("abcdxy")) == Match(long, 4)
    assert cache.match(ids("abcdef")) == Match(long, 5)
    assert cache.match(ids("x")) == Match(None, 0)
    cache.release(long)
    assert cache.match(ids("abcdxy")) == Match(short, 3)


def test_shared_cells_count_once() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, N_CELLS)
    first = resident(cache, "0123456789")
    second = resident(cache, "01234567xx")
    assert cache.used_cells == 12
    cache.release(first)
    assert cache.used_cells == 10
    cache.release(second)
    assert cache.used_cells == 0


def test_a_copy_comes_before_the_removal_of_its_source() -> None:
    cache = PrefixCache(10, N_IDS, 10)
    source = resident(cache, "abcdef")
    cache.retire(source, ids("abcdef"))
    cache.take_edits()
    target = cache.admit(ids("abcxyzuvw"), cache.match(ids("abcxyzuvw")))
    assert target is not None
    assert cache.make_room(6) == 6
    assert cache.take_edits() == (Copy(source, target, 3), Remove(source))


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, N_CELLS)
    for text in ("aaaa", "bbbb", "cccc"):
        cache.retire(resident(cache, text), ids(text))
    resident(cache, "aaax")  # uses the oldest
    cache.make_room(N_CELLS - cache.used_cells + 1)
    assert cache.match(ids("bbbbb")).length == 0
    assert cache.match(ids("aaaaa")).length == 4


def test_idle_cells_are_bounded() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, idle_cells=5)
    cache.retire(resident(cache, "aaa"), ids("aaa"))
    cache.retire(resident(cache, "bbb"), ids("bbb"))
    assert (len(cache.residents), cache.used_cells) == (1, 3)
    cache.retire(resident(cache, "cccccc"), ids("cccccc"))
    assert (len(cache.residents), cache.used_cells) == (1, 5), "the beginning is what others may share"
    assert cache.match(ids("cccccc")).length == 5


def test_idle_cells_that_a_running_sequence_shares_do_not_count_as_idle() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, idle_cells=1)
    idle = resident(cache, "abcdef")
    writing = resident(cache, "abcdeg")
    cache.retire(idle, ids("abcdef"))
    assert cache.residents == {idle: 6, writing: 6}


def test_the_bound_holds_when_the_one_who_shared_is_gone() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, idle_cells=4)
    idle, running = resident(cache, "abcdef"), resident(cache, "abcdeg")
    cache.retire(idle, ids("abcdef"))
    assert cache.used_cells == 7
    cache.release(running)
    assert (len(cache.residents), cache.used_cells) == (1, 4)


def test_can_hold_counts_everything_idle_but_the_match_as_room() -> None:
    cache = PrefixCache(10, N_IDS, 10)
    resident(cache, "rr")
    idle = resident(cache, "abcdef")
    cache.retire(idle, ids("abcdef"))
    assert cache.can_hold(8, Match(None, 0))
    assert not cache.can_hold(9, Match(None, 0))
    assert cache.can_hold(5, Match(idle, 3))
    assert not cache.can_hold(6, Match(idle, 3))


def test_the_last_id_is_taken_over_from_the_match() -> None:
    cache = PrefixCache(N_CELLS, 1, N_CELLS)
    only = resident(cache, "abcdef")
    assert cache.admit(ids("x"), Match(None, 0)) is None
    cache.retire(only, ids("abcdef"))
    cache.take_edits()
    assert cache.admit(ids("abcxyz"), cache.match(ids("abcxyz"))) == only
    assert cache.take_edits() == (Remove(only, 3),)
    assert cache.used_cells == 3


def test_a_running_sequence_gives_up_its_tail_and_goes_on() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, N_CELLS)
    first, second = resident(cache, "abcdef"), resident(cache, "abcdxy")
    cache.take_edits()
    cache.trim(first, 6)
    assert cache.take_edits() == (), "it holds no more than that"
    cache.trim(first, 3)
    assert cache.take_edits() == (Remove(first, 3),)
    assert cache.used_cells == 6, "the other still holds the fourth"
    assert cache.match(ids("abcdefg")) == Match(second, 4)
    cache.extend(first, 3)
    assert cache.match(ids("abcdefg")) == Match(first, 6)
    for seq_id in (first, second):
        cache.release(seq_id)
    assert cache.used_cells == 0


def test_what_a_trim_leaves_to_the_idle_is_bounded() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, idle_cells=2)
    idle, running = resident(cache, "abcdef"), resident(cache, "abcdefg")
    cache.retire(idle, ids("abcdef"))
    assert cache.used_cells == 7
    cache.trim(running, 1)
    assert cache.used_cells == 3


def test_adapters_never_share() -> None:
    cache = PrefixCache(N_CELLS, N_IDS, N_CELLS)
    bare = resident(cache, "abcdef")
    assert cache.match(ids("abcdefg"), "mails") == Match(None, 0)
    adapted = cache.admit(ids("abcdef"), Match(None, 0), "mails")
    assert adapted is not None
    cache.extend(adapted, 6)
    assert cache.used_cells == 12
    cache.retire(bare, ids("abcdef"))
    assert cache.match(ids("abcdefg"), "mails") == Match(adapted, 6)
    assert cache.match(ids("abcdefg")) == Match(bare, 6)


class AgainstRealCells(RuleBasedStateMachine):
    """Every edit is carried out on the fake's cells; cache and cells must agree, and a match must really be held.

    The longest prefix and the cells are recomputed here from everything that every resident holds.
    """

    @initialize(idle_cells=st.integers(0, N_CELLS), n_ids=st.integers(1, N_IDS))
    def begin(self, idle_cells: int, n_ids: int) -> None:
        self.cache = PrefixCache(N_CELLS, n_ids, idle_cells)
        self.llama = FakeLlama(n_ctx=N_CELLS, n_seq_max=n_ids)
        self.idle_cells = idle_cells
        self.running: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.adapters: dict[int, str | None] = {}

    def carry_out(self) -> None:
        for edit in self.cache.take_edits():
            if isinstance(edit, Copy):
                self.llama.copy_prefix(edit.source, edit.target, edit.length)
            else:
                assert isinstance(edit, Remove), "there are no snapshots here"
                self.llama.remove(edit.seq_id, edit.start)

    def held(self, seq_id: int) -> tuple[int, ...]:
        return self.llama.sequences.get(seq_id, ())

    def found(self, tokens: np.ndarray, adapter: str | None) -> Match:
        """The match, which must be a true one and the longest."""
        match = self.cache.match(tokens, adapter)
        # what a running sequence writes is not looked at, only its prompt
        known = [
            np.array(held[: self.prompts.get(seq_id)], np.int32)
            for seq_id, held in self.llama.sequences.items()
            if self.adapters[seq_id] == adapter
        ]
        assert match.length == max((common_prefix(tokens[:-1], k) for k in known), default=0)
        if match.source is not None:
            assert self.held(match.source)[: match.length] == tuple(tokens[: match.length])
            assert self.adapters[match.source] == adapter
        return match

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        adapter=st.sampled_from([None, None, "a", "b"]),
        chunk=st.integers(0, 12),
    )
    def admit(self, tokens: list[int], adapter: str | None, chunk: int) -> None:
        array = np.array(tokens, np.int32)
        match = self.found(array, adapter)
        seq_id = self.cache.admit(array, match, adapter)
        if seq_id is None:
            assert len(self.running) == self.llama.info.n_seq_max
            return
        room = self.cache.make_room(min(chunk, len(tokens) - match.length))
        self.carry_out()
        assert self.held(seq_id) == tuple(tokens[: match.length])
        self.running[seq_id], self.prompts[seq_id], self.adapters[seq_id] = tokens, len(tokens), adapter
        self.grow(seq_id, room)

    def grow(self, seq_id: int, count: int) -> None:
        start = len(self.held(seq_id))
        tokens = np.array(self.running[seq_id][start : start + count], np.int32)
        if count:
            positions = np.arange(start, start + count)
            self.llama.decode(Batch(tokens, positions, np.full(count, seq_id), np.zeros(count, np.int8)))
        self.cache.extend(seq_id, count)

    def cells(self, seq_ids: Iterable[int]) -> set[int]:
        return self.llama.cells_of(seq_ids)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1), count=st.integers(1, 4))
    def go_on(self, data: st.DataObject, token: int, count: int) -> None:
        """The next chunk of the prompt, or one more written token."""
        seq_id = data.draw(st.sampled_from(sorted(self.running)))
        rest = len(self.running[seq_id]) - len(self.held(seq_id))
        if rest == 0:
            self.running[seq_id] = [*self.running[seq_id], token]
        room = self.cache.make_room(min(count, max(rest, 1)))
        self.carry_out()
        self.grow(seq_id, room)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.running)))
        length = data.draw(st.integers(0, len(self.held(seq_id)) + 1))
        kept = self.held(seq_id)[:length]
        self.cache.trim(seq_id, length)
        self.carry_out()
        assert self.held(seq_id) == kept
        self.bounded()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), stays=st.booleans())
    def end(self, data: st.DataObject, stays: bool) -> None:
        """It is finished, or dropped, as by a cancel or a pre-emption."""
        seq_id = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[seq_id], self.prompts[seq_id]
        if stays:
            self.cache.retire(seq_id, np.array(self.held(seq_id), np.int32))
        else:
            self.cache.release(seq_id)
        self.carry_out()
        self.bounded()

    @rule()
    def evict(self) -> None:
        had = len(self.cache.residents) > len(self.running)
        assert self.cache.evict_idle() == had
        self.carry_out()
        assert set(self.llama.sequences) <= set(self.running)

    def bounded(self) -> None:
        assert len(self.cells(self.llama.sequences) - self.cells(self.running)) <= self.idle_cells

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), adapter=st.sampled_from([None, "a", "b"]))
    def room_beside_a_match(self, tokens: list[int], adapter: str | None) -> None:
        match = self.found(np.array(tokens, np.int32), adapter)
        kept = self.cells(self.running)
        if match.source is not None:
            kept |= self.llama.cells_of([match.source], match.length)
        assert self.cache.can_hold(N_CELLS - len(kept), match)
        assert not self.cache.can_hold(N_CELLS - len(kept) + 1, match)

    @invariant()
    def agrees(self) -> None:
        self.cache.check()
        assert {name: n for name, n in self.cache.residents.items() if n} == {
            name: len(tokens) for name, tokens in self.llama.sequences.items()
        }
        assert self.cache.used_cells == self.llama.used_cells
        free = N_CELLS - len(self.cells(self.running))
        assert self.cache.can_hold(free, Match(None, 0))
        assert not self.cache.can_hold(free + 1, Match(None, 0))

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for seq_id in self.running:
            self.cache.release(seq_id)
        self.cache.evict_idle()
        self.carry_out()
        assert self.cache.used_cells == self.llama.used_cells == 0
        assert self.cache.make_room(N_CELLS) == N_CELLS
        everyone = {self.cache.admit(np.zeros(1, np.int32), Match(None, 0)) for _ in range(self.llama.info.n_seq_max)}
        assert everyone == set(range(self.llama.info.n_seq_max))


TestAgainstRealCells = AgainstRealCells.TestCase
TestAgainstRealCells.settings = settings(max_examples=80, stateful_step_count=30)


@pytest.mark.parametrize("n_running", [0, 3])
def test_every_id_and_cell_comes_back(n_running: int) -> None:
    cache = PrefixCache(N_CELLS, N_IDS, N_CELLS)
    running = [resident(cache, "abc" + letter) for letter in "xyz"[:n_running]]
    for seq_id in running:
        cache.release(seq_id)
    assert cache.used_cells == 0
    assert all(cache.admit(ids("q"), Match(None, 0)) is not None for _ in range(N_IDS))
