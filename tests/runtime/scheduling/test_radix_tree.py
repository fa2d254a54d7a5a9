"""The radix tree against brute force: every known text is compared with every other, after every change."""

from collections.abc import Iterator

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.scheduling.radix_tree import RadixTree, _Node, common_prefix

NOTHING = np.empty(0, np.int32)
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


def test_a_look_up_compares_only_along_its_path() -> None:
    tree = RadixTree()
    for key in range(200):
        tree.add(key, np.concatenate((np.arange(1000), [key + 5000, *range(500)])).astype(np.int32), None)
    tokens = np.concatenate((np.arange(1000), [5007, 3])).astype(np.int32)
    assert tree.match(tokens, None) == (7, 1001)
    assert [len(node.edge) for node in nodes_on(tree, tokens)] == [1000, 501]


def nodes_on(tree: RadixTree, tokens: np.ndarray) -> Iterator[_Node]:
    node = tree._roots[None]
    at = 0
    while at < len(tokens) and (child := node.children.get(int(tokens[at]))):
        node, at = child, at + len(child.edge)
        yield node


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
    def every_path_is_known_and_short(self) -> None:
        for key, (adapter, text) in self.texts.items():
            assert self.tree.length(key) == len(text)
            path, node = NOTHING, self.tree._ends[key].node
            while node.parent is not None:
                assert key in node.holders
                assert node.parent.children[int(node.edge[0])] is node
                path, node = np.concatenate((node.edge, path)), node.parent
            assert node is self.tree._roots[adapter]
            assert np.array_equal(path, text)

    @invariant()
    def no_node_without_need(self) -> None:
        ends = {id(end.node) for end in self.tree._ends.values()}
        todo = [child for root in self.tree._roots.values() for child in root.children.values()]
        while todo:
            node = todo.pop()
            assert len(node.edge) > 0
            assert len(node.children) > 1 or id(node) in ends
            todo.extend(node.children.values())


TestAgainstBruteForce = AgainstBruteForce.TestCase
TestAgainstBruteForce.settings = settings(max_examples=80, stateful_step_count=30)
