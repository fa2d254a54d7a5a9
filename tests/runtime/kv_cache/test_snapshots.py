"""The catalogue of snapshots against a naive model that keeps every token; with state that cannot be cut as well."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.kv_cache.radix_tree import common_prefix
from runtime.kv_cache.snapshots import MIN_GAIN, Snapshots

ADAPTERS = [None, None, "mails"]


def run_of(parts: list[int]) -> np.ndarray:
    """Tokens in which each part is a run of 20 alike: prompts that often share long beginnings."""
    return np.repeat(np.array(parts, np.int32), 20)


def test_the_least_worth_goes_first_and_a_use_counts() -> None:
    snapshots = Snapshots(max_bytes=200, cut_limit=1000)
    first, second, third = (snapshots.add(np.full(100, k, np.int32), None) for k in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    snapshots.note_size(first, 100)
    snapshots.note_size(second, 100)
    snapshots.use(first)
    snapshots.note_size(third, 100)
    assert snapshots.bound() == [second]
    assert snapshots.match(np.zeros(99, np.int32), None) == (first, 99)


def test_more_bytes_for_as_many_tokens_are_worth_less() -> None:
    snapshots = Snapshots(max_bytes=250, cut_limit=1000)
    large, small = (snapshots.add(np.full(100, k, np.int32), None) for k in range(2))
    assert large is not None
    assert small is not None
    snapshots.note_size(small, 100)
    snapshots.note_size(large, 200)
    assert snapshots.bound() == [large]


def test_one_that_is_larger_than_the_bound_is_not_kept() -> None:
    snapshots = Snapshots(max_bytes=10, cut_limit=1000)
    key = snapshots.add(np.zeros(100, np.int32), None)
    assert key is not None
    snapshots.note_size(key, 11)
    assert snapshots.bound() == [key]
    assert len(snapshots) == snapshots.n_bytes == 0


@pytest.mark.parametrize(("cut_limit", "n_left"), [(1000, 1), (0, 2)])
def test_a_longer_one_takes_the_place_of_its_beginning_if_it_can_be_cut(cut_limit: int, n_left: int) -> None:
    snapshots = Snapshots(max_bytes=1000, cut_limit=cut_limit)
    tokens = np.zeros(200, np.int32)
    assert snapshots.add(tokens[:100], None) is not None
    assert snapshots.add(tokens, None) is not None
    assert len(snapshots) == n_left
    assert snapshots.match(tokens[:150], None)[1] == (150 if cut_limit else 100)


def test_what_is_known_is_not_saved_again() -> None:
    snapshots = Snapshots(max_bytes=1000, cut_limit=1000)
    assert snapshots.add(np.zeros(MIN_GAIN - 1, np.int32), None) is None
    assert snapshots.add(np.zeros(100, np.int32), None) is not None
    assert snapshots.add(np.zeros(100 + MIN_GAIN - 1, np.int32), None) is None
    assert snapshots.add(np.zeros(100, np.int32), "mails") is not None


def test_one_on_disk_stays_known_when_it_leaves_memory_and_is_forgotten_with_its_file() -> None:
    snapshots = Snapshots(max_bytes=100, cut_limit=1000)
    first, second = (snapshots.add(np.full(100, k, np.int32), None) for k in range(2))
    assert first is not None
    assert second is not None
    snapshots.note_disk(first, on_disk=True)
    snapshots.note_size(first, 60)
    snapshots.note_size(second, 50)
    assert snapshots.bound() == [first]
    assert (snapshots.n_bytes, snapshots.in_memory(first), snapshots.take_dropped()) == (50, False, [])
    assert snapshots.match(np.zeros(99, np.int32), None) == (first, 99)
    snapshots.note_disk(first, on_disk=False)
    assert snapshots.match(np.zeros(99, np.int32), None) == (None, 0)
    assert snapshots.take_dropped() == [first]


class AgainstAllTokens(RuleBasedStateMachine):
    """A match must be true, cut only where it may be, and the longest that any snapshot can give."""

    @initialize(cut_limit=st.sampled_from([0, 50, 90, 1000]), max_bytes=st.integers(0, 3000))
    def begin(self, cut_limit: int, max_bytes: int) -> None:
        self.snapshots = Snapshots(max_bytes, cut_limit)
        self.cut_limit, self.max_bytes = cut_limit, max_bytes
        self.held: dict[int, tuple[np.ndarray, str | None]] = {}
        self.on_disk: set[int] = set()

    def best(self, tokens: np.ndarray, adapter: str | None) -> int:
        lengths = [0]
        for held, other in self.held.values():
            shared = common_prefix(held, tokens)
            if adapter == other and (len(held) <= self.cut_limit or shared == len(held)):
                lengths.append(shared)
        return max(lengths)

    @rule(
        parts=st.lists(st.integers(0, 2), min_size=1, max_size=6),
        adapter=st.sampled_from(ADAPTERS),
        per=st.integers(1, 9),
    )
    def add(self, parts: list[int], adapter: str | None, per: int) -> None:
        tokens = run_of(parts)
        gain = len(tokens) - self.best(tokens, adapter)
        key = self.snapshots.add(tokens, adapter)
        assert (key is None) == (gain < MIN_GAIN)
        if key is None:
            return
        assert key not in self.held, "numbers are not given twice"
        self.held[key] = (tokens, adapter)
        self.snapshots.note_size(key, len(tokens) * per)
        dropped = self.snapshots.bound()
        self.held = {key: held for key, held in self.held.items() if key in self.snapshots}
        assert {key for key in dropped if key in self.held} <= self.on_disk

    @rule(data=st.data(), on_disk=st.booleans())
    def write_or_delete(self, data: st.DataObject, on_disk: bool) -> None:
        if self.held:
            key = data.draw(st.sampled_from(sorted(self.held)))
            self.snapshots.note_disk(key, on_disk=on_disk)
            (self.on_disk.add if on_disk else self.on_disk.discard)(key)
            if not on_disk and not self.snapshots.in_memory(key):
                del self.held[key]

    @rule(data=st.data(), n_bytes=st.integers(1, 500))
    def load(self, data: st.DataObject, n_bytes: int) -> None:
        """The bytes of one on disk are in memory again."""
        absent = sorted(key for key in self.held if not self.snapshots.in_memory(key))
        if absent:
            self.snapshots.note_size(data.draw(st.sampled_from(absent)), n_bytes)
            self.snapshots.bound()
            self.held = {key: held for key, held in self.held.items() if key in self.snapshots}

    @rule(parts=st.lists(st.integers(0, 2), max_size=7), adapter=st.sampled_from(ADAPTERS), uses=st.booleans())
    def look_up(self, parts: list[int], adapter: str | None, uses: bool) -> None:
        tokens = run_of(parts)
        key, length = self.snapshots.match(tokens, adapter)
        assert length == self.best(tokens, adapter)
        if key is not None:
            held, other = self.held[key]
            assert other == adapter
            assert np.array_equal(held[:length], tokens[:length])
            assert self.snapshots.floor(len(held)) <= length
            if uses:
                self.snapshots.use(key)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.held:
            key = data.draw(st.sampled_from(sorted(self.held)))
            self.snapshots.drop(key)
            del self.held[key]

    @invariant()
    def agrees(self) -> None:
        self.snapshots.check()
        assert len(self.snapshots) == len(self.held)


TestAgainstAllTokens = AgainstAllTokens.TestCase
TestAgainstAllTokens.settings = settings(max_examples=80, stateful_step_count=30)
