"""The radix tree against brute force: every known text is compared with every other, after every change."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.kv_cache import radix_tree
from runtime.kv_cache.radix_tree import RadixTree, common_prefix

TEXTS = st.lists(st.integers(0, 2), max_size=10).map(lambda tokens: np.array(tokens, np.int32))
ADAPTERS = st.sampled_from([None, "a"])


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def test_common_prefix() -> None:
    cases = [("", "", 0), ("a", "", 0), ("abc", "abd", 2), ("abc", "abcd", 3), ("x", "y", 0)]
    assert [common_prefix(ids(left), ids(right)) for left, right, _ in cases] == [length for *_, length in cases]


def test_part_of_an_edge_counts_to_the_token() -> None:
    tree = RadixTree()
    tree.add(1, ids("instructions"), None)
    assert tree.match(ids("instruments"), None) == (1, 6)
    tree.add(2, ids("instruments"), None)
    assert tree.match(ids("instructed"), None) == (1, 8)
    assert tree.match(ids("insect"), None) == (2, 3)
    assert tree.match(ids("in"), None) == (2, 2)
    assert tree.match(ids("outside"), None) == (None, 0)


def test_a_look_up_compares_only_along_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RadixTree()
    for key in range(200):
        tree.add(key, np.concatenate((np.arange(1000), [key + 5000, *range(500)])).astype(np.int32), None)
    tokens = np.concatenate((np.arange(1000), [5007, 3])).astype(np.int32)
    compared: list[int] = []

    def counting(edge: np.ndarray, rest: np.ndarray) -> int:
        compared.append(len(edge))
        return common_prefix(edge, rest)

    monkeypatch.setattr(radix_tree, "common_prefix", counting)
    assert tree.match(tokens, None) == (7, 1001)
    assert compared == [1000, 501]


class AgainstBruteForce(RuleBasedStateMachine):
    """Texts come, grow, shrink and go."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixTree()
        self.texts: dict[int, tuple[str | None, np.ndarray]] = {}
        self.n = 0

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    @rule(text=TEXTS, adapter=ADAPTERS)
    def add(self, text: np.ndarray, adapter: str | None) -> None:
        self.tree.add(self.n, text, adapter)
        self.texts[self.n] = (adapter, text)
        self.n += 1

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), more=TEXTS)
    def extend(self, data: st.DataObject, more: np.ndarray) -> None:
        key = self.pick(data)
        adapter, text = self.texts[key]
        self.tree.extend(key, more)
        self.texts[key] = (adapter, np.concatenate((text, more)))

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), length=st.integers(0, 12))
    def shorten(self, data: st.DataObject, length: int) -> None:
        key = self.pick(data)
        adapter, text = self.texts[key]
        self.tree.shorten(key, length)
        self.texts[key] = (adapter, text[:length])

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        key = self.pick(data)
        for _ in range(2):
            self.tree.discard(key)
        del self.texts[key]

    @rule(tokens=TEXTS, adapter=ADAPTERS)
    def match(self, tokens: np.ndarray, adapter: str | None) -> None:
        holder, length = self.tree.match(tokens, adapter)
        lengths = {key: common_prefix(tokens, text) for key, (under, text) in self.texts.items() if under == adapter}
        assert length == max(lengths.values(), default=0)
        assert (holder is None) == (length == 0)
        assert holder is None or lengths[holder] == length

    @invariant()
    def every_text_is_known(self) -> None:
        for key, (_, text) in self.texts.items():
            assert self.tree.length(key) == len(text)
            assert np.array_equal(self.tree.tokens(key), text)

    @invariant()
    def the_tree_is_sound(self) -> None:
        self.tree.check()


TestAgainstBruteForce = AgainstBruteForce.TestCase
TestAgainstBruteForce.settings = settings(max_examples=80, stateful_step_count=30)
