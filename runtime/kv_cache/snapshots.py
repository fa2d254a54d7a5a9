"""The catalogue of snapshots of computed prefixes, with the worth of each. Pure: the engine has the bytes.

A snapshot holds what a model computed for the tokens of one sequence. It is taken when the KV cache needs the cells of
an idle sequence (`at_once`: when a sequence ends, since the process may be killed), and put back when a prompt begins
with the same tokens: a few milliseconds where computing takes seconds. Tokens are compared themselves, under the same
adapter; there is no hash to collide. Some snapshots are on disk as well, or only there: these take no memory, and stay
known when the memory is needed.

A plain KV cache can be cut at any length. Layers with a sliding window keep only their last cells, so a snapshot that
is longer than the window is good at its own length only, and state that is no sequence of cells at any length.
"""

from dataclasses import dataclass

import numpy as np

from .radix_tree import RadixTree

# Tokens that a snapshot must save beyond what is known anyway. Restoring takes as long as computing about two tokens
# (Gemma 3 270M, 2 AVX2 cores: 2-4 ms), and a step is made in either case.
MIN_GAIN = 32


@dataclass(slots=True)
class _Snapshot:
    """`n_bytes` and `worth` are 0 while it takes no memory: its bytes are not known yet, or on disk only."""

    length: int
    adapter: str | None
    on_disk: bool = False
    n_bytes: int = 0
    n_uses: int = 1
    worth: float = 0.0


class Snapshots:
    """The catalogue of at most `max_bytes` of snapshots; one of `cut_limit` tokens or fewer can be cut at any length.

    A snapshot's worth is the tokens that it saves per byte, once for each use, above the worth of the last one that
    went (greedy dual size frequency): so what is not used loses to what is new, and a use counts for a while.
    """

    def __init__(self, max_bytes: int, cut_limit: int, *, at_once: bool = False) -> None:
        self.cut_limit = cut_limit
        self.at_once = at_once
        self._max_bytes = max_bytes
        self._held: dict[int, _Snapshot] = {}
        self._tree = RadixTree()
        self._next_key = 0
        self._inflation = 0.0
        self._dropped: list[int] = []
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def length(self, key: int) -> int:
        """The tokens of a snapshot."""
        return self._held[key].length

    def content(self, key: int) -> tuple[np.ndarray, str | None]:
        """The tokens of a snapshot, and the adapter that it was computed under."""
        return self._tree.tokens(key), self._held[key].adapter

    def floor(self, length: int) -> int:
        """The shortest beginning that can be cut from a snapshot of `length` tokens."""
        return 0 if length <= self.cut_limit else length

    def match(self, tokens: np.ndarray, adapter: str | None) -> tuple[int | None, int]:
        """(the snapshot that can give most of the beginning of `tokens`, how many); (None, 0) if none can."""
        return self._tree.match(tokens, adapter)

    def shared(self, tokens: np.ndarray, adapter: str | None) -> int:
        """The tokens that a snapshot begins with as well, though it may not give them: others may share them too."""
        return self._tree.shared(tokens, adapter)

    def use(self, key: int) -> None:
        """Note that a snapshot was worth restoring, if it is known."""
        if snapshot := self._held.get(key):
            snapshot.n_uses += 1
            self._value(snapshot)

    def add(self, tokens: np.ndarray, adapter: str | None) -> int | None:
        """The number of a new snapshot of `tokens`; None if those known already give almost as much."""
        known, length = self.match(tokens, adapter)
        if len(tokens) - length < MIN_GAIN:
            return None
        floor = self.floor(len(tokens))
        key, self._next_key = self._next_key, self._next_key + 1
        self._held[key] = _Snapshot(len(tokens), adapter)
        self._tree.add(key, tokens, adapter, floor)
        if known is not None and self._held[known].length == length and floor == 0:
            self.drop(known)  # the new one gives all that it could
        return key

    def in_memory(self, key: int) -> bool:
        """True if the snapshot is known and takes memory."""
        return key in self._held and self._held[key].n_bytes > 0

    def note_size(self, key: int, n_bytes: int) -> None:
        """Note the bytes of a snapshot that is in memory now."""
        if snapshot := self._held.get(key):
            self.n_bytes += n_bytes - snapshot.n_bytes
            snapshot.n_bytes = n_bytes
            self._value(snapshot)

    def note_disk(self, key: int, *, on_disk: bool) -> None:
        """Note that a snapshot is on disk, or no more: one that takes no memory is dropped then."""
        if snapshot := self._held.get(key):
            snapshot.on_disk = on_disk
            if not on_disk and not snapshot.n_bytes:
                self.drop(key)

    def bound(self) -> list[int]:
        """Take the least worth out of memory until the others are within the bound. Returns those taken out."""
        taken = []
        while self.n_bytes > self._max_bytes:
            key = min((key for key, held in self._held.items() if held.n_bytes), key=lambda key: self._held[key].worth)
            snapshot = self._held[key]
            self._inflation = snapshot.worth
            taken.append(key)
            if snapshot.on_disk:
                self.n_bytes -= snapshot.n_bytes
                snapshot.n_bytes, snapshot.worth = 0, 0.0
            else:
                self.drop(key)
        return taken

    def drop(self, key: int) -> None:
        """Forget a snapshot, if it is known."""
        if snapshot := self._held.pop(key, None):
            self.n_bytes -= snapshot.n_bytes
            self._tree.discard(key)
            self._dropped.append(key)

    def take_dropped(self) -> list[int]:
        """The snapshots that were forgotten since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def __contains__(self, key: int) -> bool:
        return key in self._held

    def check(self) -> None:
        """Raise AssertionError unless sizes, bound and tree agree."""
        assert self.n_bytes == sum(held.n_bytes for held in self._held.values()), "bytes are counted wrongly"
        assert self.n_bytes <= self._max_bytes, "snapshots hold more than the bound"
        for key, held in self._held.items():
            assert self._tree.length(key) == held.length, "the tree knows another length"
        self._tree.check()

    def _value(self, snapshot: _Snapshot) -> None:
        if snapshot.n_bytes:
            snapshot.worth = self._inflation + snapshot.n_uses * snapshot.length / snapshot.n_bytes
