"""A radix tree over token ids: finds the sequence that shares the longest beginning with a prompt. Pure.

             ┌─ "tell me about Rome"    held by 1
    "please " ┤
             └─ "translate: " ─┬─ "Haus"   held by 2
                               └─ "Boot"   held by 3

An edge is a run of tokens, compared as a whole, so a look-up costs the length of its match, however many sequences
there are. Every adapter has a tree of its own: cells computed under one adapter are not valid under another.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(eq=False, slots=True)
class _Node:
    """`edge` leads here from `parent`. `holders`, oldest first, have every token from the root to its end."""

    edge: np.ndarray
    parent: "_Node | None"
    children: dict[int, "_Node"] = field(default_factory=dict)
    holders: dict[int, None] = field(default_factory=dict)


@dataclass(slots=True)
class _End:
    """The end of a sequence: its last node, its length in tokens, and the shortest beginning it can be cut to."""

    node: _Node
    length: int
    floor: int


class RadixTree:
    """The tokens of numbered sequences. Every node but a root has two children at least, or a sequence ends there."""

    def __init__(self) -> None:
        self._roots: dict[str | None, _Node] = {}
        self._ends: dict[int, _End] = {}

    def length(self, key: int) -> int:
        """The number of known tokens of sequence `key`."""
        return self._ends[key].length

    def tokens(self, key: int) -> np.ndarray:
        """The known tokens of sequence `key`."""
        edges, node = [], self._ends[key].node
        while node.parent is not None:
            edges.append(node.edge)
            node = node.parent
        return np.concatenate([np.empty(0, np.int32), *reversed(edges)])

    def match(self, tokens: np.ndarray, adapter: str | None) -> tuple[int | None, int]:
        """(the newest sequence that begins with most of `tokens`, how many they share); (None, 0) if none does.

        A sequence counts only where it shares its floor at least.
        """
        for node, length in reversed(self._path(tokens, adapter)):
            for key in reversed(node.holders):
                if self._ends[key].floor <= length:
                    return key, length
        return None, 0

    def shared(self, tokens: np.ndarray, adapter: str | None) -> int:
        """The number of first `tokens` that some sequence begins with, at any floor."""
        return max((length for _, length in self._path(tokens, adapter)), default=0)

    def _path(self, tokens: np.ndarray, adapter: str | None) -> list[tuple[_Node, int]]:
        """The nodes that `tokens` lead through, each with the number of tokens that it shares up to there."""
        node, length = self._roots.get(adapter), 0
        path: list[tuple[_Node, int]] = []
        while node is not None and length < len(tokens):
            node = node.children.get(int(tokens[length]))
            if node is not None:
                shared = common_prefix(node.edge, tokens[length:])
                length += shared
                path.append((node, length))
                node = node if shared == len(node.edge) else None
        return path

    def add(self, key: int, tokens: np.ndarray, adapter: str | None, floor: int = 0) -> None:
        """Add a sequence that begins with `tokens`; with a `floor` no shorter beginning of it can be shared."""
        root = self._roots.setdefault(adapter, _Node(np.empty(0, np.int32), None))
        self._ends[key] = _End(root, 0, floor)
        self.extend(key, tokens)

    def floor(self, key: int) -> int:
        """The shortest beginning of sequence `key` that can be shared."""
        return self._ends[key].floor

    def raise_floor(self, key: int, floor: int) -> None:
        """Share no beginning of sequence `key` that is shorter than `floor`."""
        self._ends[key].floor = max(self._ends[key].floor, floor)

    def extend(self, key: int, tokens: np.ndarray) -> None:
        """Append `tokens` to the known tokens of sequence `key`."""
        end = self._ends[key]
        before = end.node
        end.length += len(tokens)
        while len(tokens):
            child = end.node.children.get(int(tokens[0]))
            if child is None:
                child = end.node.children[int(tokens[0])] = _Node(tokens.copy(), end.node)
            shared = common_prefix(child.edge, tokens)
            end.node = child if shared == len(child.edge) else _split(child, shared)
            end.node.holders[key] = None
            tokens = tokens[shared:]
        _merge(before)

    def shorten(self, key: int, length: int) -> None:
        """Forget the tokens of sequence `key` after its first `length`."""
        end = self._ends[key]
        while end.length > length:
            node, start = end.node, end.length - len(end.node.edge)
            assert node.parent is not None
            if start < length:
                end.node, end.length = _split(node, length - start), length
            else:
                end.node, end.length = node.parent, start
            del node.holders[key]
            _merge(node)

    def discard(self, key: int) -> None:
        """Forget sequence `key`, if it is known."""
        if key in self._ends:
            self.shorten(key, 0)
            del self._ends[key]

    def check(self) -> None:
        """Raise AssertionError unless every node is linked both ways, held by those below it, and needed."""
        ends = {id(end.node) for end in self._ends.values()}
        for key, end in self._ends.items():
            assert end.length == len(self.tokens(key)), "a sequence ends elsewhere"
            node = end.node
            while node.parent is not None:
                assert key in node.holders, "a sequence does not hold its path"
                node = node.parent
            assert node in self._roots.values(), "a path leads to no root"
        todo = list(self._roots.values())
        while todo:
            node = todo.pop()
            for first, child in node.children.items():
                assert child.parent is node, "a child has another parent"
                assert len(child.edge) > 0, "an edge is empty"
                assert child.edge[0] == first, "a child is filed under another token"
                assert len(child.children) > 1 or id(child) in ends, "a node is not needed"
            todo.extend(node.children.values())


def _split(node: _Node, at: int) -> _Node:
    """Cut `node`'s edge in two. Returns the new node in the middle; `node` itself stays the lower end."""
    assert node.parent is not None
    middle = _Node(node.edge[:at], node.parent, {int(node.edge[at]): node}, node.holders.copy())
    node.parent.children[int(node.edge[0])] = middle
    node.edge, node.parent = node.edge[at:], middle
    return middle


def _merge(node: _Node) -> None:
    """Take `node` out if no sequence holds it, or join it to its only child if no sequence ends at it."""
    if node.parent is None:
        return
    first = int(node.edge[0])
    if not node.holders:
        del node.parent.children[first]
    elif len(node.children) == 1:
        (child,) = node.children.values()
        if len(child.holders) == len(node.holders):
            child.edge, child.parent = np.concatenate((node.edge, child.edge)), node.parent
            node.parent.children[first] = child


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """The number of first elements that two one-dimensional arrays share."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
