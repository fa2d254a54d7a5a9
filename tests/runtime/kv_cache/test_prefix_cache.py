"""The cache against a plain model of a cache that really holds tokens, and its rules one by one."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.kv_cache.prefix_cache import ALIGN, Copy, Match, PrefixCache, Remove
from runtime.kv_cache.radix_tree import common_prefix
from runtime.kv_cache.snapshots import MIN_GAIN
from runtime.llama.interface import Batch
from tests.support.runtime.fakes import FakeLlama

N_CELLS, N_IDS = 40, 5


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def cache_of(n_cells: int = N_CELLS, n_streams: int = N_IDS, cut_limit: int | None = N_CELLS) -> PrefixCache:
    return PrefixCache(n_cells, n_streams, cut_limit)


def resident(cache: PrefixCache, text: str) -> int:
    """A running sequence that holds all of `text`."""
    match = cache.match(ids(text))
    seq_id = cache.admit(ids(text), match)
    assert seq_id is not None
    assert cache.make_room(len(text) - match.length) == len(text) - match.length
    cache.extend(seq_id, len(text) - match.length)
    return seq_id


LONG = "abcdefgh" * 4


def test_the_longest_prefix_is_found() -> None:
    cache = cache_of(1000)
    short, long = resident(cache, LONG + "abc"), resident(cache, LONG + "abcdef")
    assert cache.match(ids(LONG + "abcdxy")) == Match(long, 36)
    assert cache.match(ids(LONG + "abcdef")) == Match(long, 38)
    assert cache.match(ids("x")) == Match(None, 0)
    cache.release(long)
    assert cache.match(ids(LONG + "abcdxy")) == Match(short, 35)


def test_a_running_sequence_is_copied_from_if_that_pays() -> None:
    cache = cache_of(1000)
    source = resident(cache, LONG + "abc")
    assert cache.match(ids(LONG[: MIN_GAIN - 1] + "x")) == Match(None, 0)
    cache.take_edits()
    target = resident(cache, LONG + "xyz")
    assert cache.take_edits() == (Copy(source, target, 32),)
    assert cache.used_cells == 35 + 35, "each has cells of its own"


def test_an_idle_sequence_is_taken_over_by_a_prompt_that_has_most_of_it() -> None:
    cache = cache_of(1000)
    source = resident(cache, "abcdef")
    cache.retire(source, ids("abcdef"))
    cache.take_edits()
    assert cache.admit(ids("abcdxyz"), cache.match(ids("abcdxyz"))) == source
    assert cache.take_edits() == (Remove(source, 4),)
    assert cache.used_cells == 4


def test_an_idle_sequence_is_copied_from_by_a_prompt_that_has_little_of_it() -> None:
    cache = cache_of(1000, cut_limit=1000)
    source = resident(cache, LONG * 3)
    cache.retire(source, ids(LONG * 3))
    cache.take_edits()
    target = resident(cache, LONG + "xyz")
    assert cache.take_edits() == (Copy(source, target, 32),)
    assert cache.residents == {source: 96, target: 35}


def test_an_idle_sequence_is_not_taken_over_for_a_few_tokens_of_it() -> None:
    cache = cache_of(1000, n_streams=1)
    cache.retire(resident(cache, LONG), ids(LONG))
    assert cache.match(ids(LONG[:15] + "xyz")) == Match(None, 0)
    assert cache.match(ids(LONG[:16] + "xyz")).length == 16


def test_without_a_free_stream_or_cells_it_is_taken_over_all_the_same() -> None:
    for cache in (cache_of(1000, n_streams=1), cache_of(100), cache_of(1000, cut_limit=None)):
        source = resident(cache, LONG * 3)
        cache.retire(source, ids(LONG * 3))
        assert cache.admit(ids(LONG + "xyz"), cache.match(ids(LONG + "xyz"))) == source
        assert cache.residents == {source: 32}


def test_beyond_the_limit_a_copy_is_whole_and_aligned_or_not_at_all() -> None:
    cache = cache_of(1000, cut_limit=40)
    text = LONG * 2
    source = resident(cache, text)
    assert len(text) == ALIGN
    assert cache.match(ids(text + "x")) == Match(source, ALIGN)
    assert cache.match(ids(text[:50] + "x")) == Match(None, 0), "a copy would lack cells"
    cache.extend(source, 1)
    assert cache.match(ids(text + "x")) == Match(None, 0)
    cache.retire(source, ids(text + "y"))
    assert cache.match(ids(text[:50] + "x")) == Match(source, 50), "in place it can be cut"


def test_a_copy_beyond_the_limit_cannot_be_cut_again() -> None:
    cache = cache_of(1000, cut_limit=40)
    text = LONG * 2
    copy = cache.admit(ids(text + "x"), Match(resident(cache, text), ALIGN))
    assert copy is not None
    assert cache.floor(copy) == ALIGN


def test_the_least_recently_used_goes_first() -> None:
    cache = cache_of(20)
    for text in ("aaaa", "bbbb", "cccc"):
        cache.retire(resident(cache, text), ids(text))
    used = resident(cache, "aaax")  # takes over the oldest
    cache.retire(used, ids("aaax"))
    cache.make_room(20 - cache.used_cells + 1)
    assert cache.match(ids("bbbbb")).length == 0
    assert cache.match(ids("aaaaa")).length == 3


def test_can_hold_counts_everything_idle_as_room() -> None:
    cache = cache_of(10)
    resident(cache, "rr")
    cache.retire(resident(cache, "abcdef"), ids("abcdef"))
    assert cache.can_hold(8)
    assert not cache.can_hold(9)


def test_while_every_stream_runs_nobody_is_admitted() -> None:
    cache = cache_of(n_streams=1)
    resident(cache, "abcdef")
    assert cache.admit(ids("x"), Match(None, 0)) is None


def test_a_running_sequence_gives_up_its_tail_and_goes_on() -> None:
    cache = cache_of()
    first = resident(cache, "abcdef")
    cache.take_edits()
    cache.trim(first, 6)
    assert cache.take_edits() == (), "it holds no more than that"
    cache.trim(first, 3)
    assert cache.take_edits() == (Remove(first, 3),)
    assert cache.used_cells == 3
    cache.extend(first, 3)
    cache.release(first)
    assert cache.used_cells == 0


def test_adapters_never_share() -> None:
    cache = cache_of(1000)
    bare = resident(cache, LONG)
    assert cache.match(ids(LONG + "g"), "mails") == Match(None, 0)
    adapted = cache.admit(ids(LONG), Match(None, 0), "mails")
    assert adapted is not None
    cache.extend(adapted, 32)
    cache.retire(bare, ids(LONG))
    assert cache.match(ids(LONG + "g"), "mails") == Match(adapted, 32)
    assert cache.match(ids(LONG + "g")) == Match(bare, 32)


class AgainstRealCells(RuleBasedStateMachine):
    """Every edit is carried out on the fake's cells; cache and cells must agree, and a match must really be held.

    The longest prefix and the cells are recomputed here from everything that every resident holds.
    """

    @initialize(n_ids=st.integers(1, N_IDS), window=st.sampled_from([None, 0, 10]))
    def begin(self, n_ids: int, window: int | None) -> None:
        self.llama = FakeLlama(n_ctx=N_CELLS, n_seq_max=n_ids, window=window)
        self.cache = PrefixCache(N_CELLS, n_ids, self.llama.info.cut_limit)
        self.running: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.adapters: dict[int, str | None] = {}

    def carry_out(self) -> None:
        for edit in self.cache.take_edits():
            if isinstance(edit, Copy):
                self.llama.copy_prefix(edit.source, edit.target, edit.length)
                assert self.llama.is_whole(edit.target, edit.length)
            else:
                assert isinstance(edit, Remove), "there are no snapshots here"
                self.llama.remove(edit.seq_id, edit.start)
                assert self.llama.is_whole(edit.seq_id, edit.start)

    def held(self, seq_id: int) -> tuple[int, ...]:
        return self.llama.sequences.get(seq_id, ())

    def found(self, tokens: np.ndarray, adapter: str | None) -> Match:
        """The match, which must be a true one; and the longest where nothing must be copied."""
        match = self.cache.match(tokens, adapter)
        known = [
            np.array(held, np.int32)
            for seq_id, held in self.llama.sequences.items()
            if self.adapters[seq_id] == adapter and seq_id not in self.running
        ]
        shared = [(common_prefix(tokens, k), len(k)) for k in known]
        longest = max((length for length, whole in shared if 2 * length >= whole), default=0)
        assert match.length >= longest or self.running or self.llama.window < N_CELLS or len(known) > 1
        if match.source is not None:
            assert self.held(match.source)[: match.length] == tuple(tokens[: match.length])
            assert self.adapters[match.source] == adapter
        return match

    @rule(
        tokens=st.integers(0, 3).flatmap(lambda n: st.lists(st.integers(0, 1), min_size=10 * n, max_size=10 * n + 6)),
        adapter=st.sampled_from([None, None, "a", "b"]),
        chunk=st.integers(0, 12),
    )
    def admit(self, tokens: list[int], adapter: str | None, chunk: int) -> None:
        tokens = [0] * (len(tokens) // 2) + tokens[len(tokens) // 2 :]
        array = np.array(tokens, np.int32)
        match = self.found(array, adapter)
        seq_id = self.cache.admit(array, match, adapter)
        if seq_id is None:
            room = N_CELLS - sum(len(self.held(running)) for running in self.running)
            assert len(self.running) == self.llama.info.n_seq_max or room < match.length
            return
        self.running[seq_id], self.prompts[seq_id], self.adapters[seq_id] = tokens, len(tokens), adapter
        room = self.cache.make_room(min(chunk, len(tokens) - match.length))
        self.carry_out()
        assert self.held(seq_id) == tuple(tokens[: match.length])
        self.grow(seq_id, room)

    def grow(self, seq_id: int, count: int) -> None:
        start = len(self.held(seq_id))
        tokens = np.array(self.running[seq_id][start : start + count], np.int32)
        if count:
            positions = np.arange(start, start + count)
            self.llama.decode(Batch(tokens, positions, np.full(count, seq_id), np.zeros(count, np.int8)))
        self.cache.extend(seq_id, count)

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

    @rule()
    def evict(self) -> None:
        had = len(self.cache.residents) > len(self.running)
        assert self.cache.evict_idle() == had
        self.carry_out()
        assert set(self.llama.sequences) <= set(self.running)

    @invariant()
    def agrees(self) -> None:
        self.cache.check()
        assert {name: n for name, n in self.cache.residents.items() if n} == {
            name: len(tokens) for name, tokens in self.llama.sequences.items()
        }
        assert self.cache.used_cells == self.llama.used_cells
        free = N_CELLS - sum(len(self.held(seq_id)) for seq_id in self.running)
        assert self.cache.can_hold(free)
        assert not self.cache.can_hold(free + 1)

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
    cache = cache_of()
    running = [resident(cache, "abc" + letter) for letter in "xyz"[:n_running]]
    for seq_id in running:
        cache.release(seq_id)
    assert cache.used_cells == 0
    assert all(cache.admit(ids("q"), Match(None, 0)) is not None for _ in range(N_IDS))
