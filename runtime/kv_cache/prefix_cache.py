"""Bookkeeping of the KV cache: a stream for each sequence, and finished prompts kept for the next ones. Pure.

    stream 0   running  ■ ■ ■ ■ ■ ■ ■ ■
    stream 1   idle     ■ ■ ■ ■ ■            finished: taken over by a prompt with the same beginning, or copied from
    stream 2   running  ■ ■ ■
    stream 3   free                           what left it is in a snapshot

A sequence computes in a stream of its own and reads no other's cells, so its speed does not depend on what the others
hold. A finished one stays in its stream, idle, until the stream or its cells are needed (least recently used first);
what it holds is saved as a snapshot then (`Snapshots`), or when it ends if snapshots outlive the process, and restored
where a prompt's longest match is there.

A radix tree finds the resident that holds the beginning of a new prompt. It has only tokens that were computed as a
prompt's, unless the owner retires a sequence with more.

Cells can be cut off in place at any length. A copy or a snapshot loses the cells that left a sliding window: if it is
longer than `cut_limit` it is good at its own length only, which is a multiple of ALIGN then.

Every change is noted as an edit; the engine applies the edits in order to the real cache (`take_edits`).
"""

from bisect import insort
from dataclasses import dataclass

import numpy as np

from .radix_tree import RadixTree
from .snapshots import MIN_GAIN, Snapshots

# Layers with a sliding window come back with fewer cells, from the first cell on. Sums over cells are computed by lanes
# of the processor's vectors: moved by a multiple of this, each cell stays in its lane and every bit is as it was.
ALIGN = 64


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt: `length` tokens, held by sequence id `source` or in a `snapshot`.

    Both are None if nothing matches.
    """

    source: int | None
    length: int
    snapshot: int | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """Give `target`, an empty sequence, cells of its own with the first `length` tokens of `source`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Free the cells of `seq_id` at positions `start` and up."""

    seq_id: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """Take a snapshot, number `snapshot`, of the `length` tokens that `seq_id` holds."""

    seq_id: int
    snapshot: int
    length: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Give `seq_id`, an empty sequence, cells of its own with the first `length` tokens of a snapshot."""

    snapshot: int
    seq_id: int
    length: int


Edit = Copy | Remove | Save | Restore


@dataclass(eq=False, slots=True)
class _Resident:
    """A sequence in a stream of `length` cells. Others may share those of `tokens`, and last shared `n_shared`."""

    tokens: np.ndarray
    adapter: str | None
    length: int = 0
    n_shared: int = 0


class PrefixCache:
    """Bookkeeping of `n_streams` streams that hold at most `n_cells` cells in all.

    Copies and snapshots of at most `cut_limit` tokens can be cut at any length (None: the model has neither). Without
    `snapshots` what is evicted is computed again.
    """

    def __init__(self, n_cells: int, n_streams: int, cut_limit: int | None, snapshots: Snapshots | None = None) -> None:
        self.n_cells = n_cells
        self.used_cells = 0
        self._cut_limit = cut_limit
        self._snapshots = snapshots
        self._n_saved = 0 if snapshots is None else len(snapshots)
        self._free_ids = list(range(n_streams))
        self._running: dict[int, _Resident] = {}
        self._idle: dict[int, _Resident] = {}
        self._tree = RadixTree()
        self._edits: list[Edit] = []

    @property
    def residents(self) -> dict[int, int]:
        """The cells that each resident holds, running or idle, by sequence id."""
        return {seq_id: resident.length for seq_id, resident in (self._running | self._idle).items()}

    def match(self, tokens: np.ndarray, adapter: str | None = None) -> Match:
        """The longest beginning of `tokens` that is known and can be had.

        It is a snapshot's only if that holds so much more than any resident that restoring it pays.
        """
        held = self._usable(*self._tree.match(tokens, adapter))
        if self._snapshots is None or len(tokens) - held.length < MIN_GAIN or not self._n_saved:
            return held
        snapshot, length = self._snapshots.match(tokens, adapter)
        return Match(None, length, snapshot) if length - held.length >= MIN_GAIN else held

    def copy_length(self, whole: int, length: int) -> int:
        """The tokens that a copy can have of the first `length` of a sequence that holds `whole`; 0 if it cannot be."""
        if self._cut_limit is None or length < MIN_GAIN:
            return 0
        return length if self.can_cut(whole) or (length == whole and whole % ALIGN == 0) else 0

    def can_cut(self, length: int) -> bool:
        """True if a copy or a snapshot of a sequence of `length` tokens can be cut at any length."""
        return self._cut_limit is not None and length <= self._cut_limit

    def aligned(self, length: int) -> int:
        """The longest beginning of `length` tokens that a copy or a snapshot can be taken of."""
        return length if self._cut_limit is None or self.can_cut(length) else length - length % ALIGN

    def floor(self, seq_id: int) -> int:
        """The shortest beginning of a resident that others may share."""
        return self._tree.floor(seq_id)

    def can_hold(self, cells: int) -> bool:
        """True if `cells` more fit beside the running sequences once every idle one is evicted."""
        return self.n_cells - sum(resident.length for resident in self._running.values()) >= cells

    def admit(self, tokens: np.ndarray, match: Match, adapter: str | None = None) -> int | None:
        """Give a stream to a sequence that begins with `tokens`, of which those of the match are there already.

        None if a sequence runs in every stream. The match was found under the same `adapter`.
        """
        whole = 0  # of the snapshot, which an evicted one may take the place of
        if match.snapshot is not None and self._snapshots is not None:
            whole = self._snapshots.length(match.snapshot)
        source = self._idle.get(-1 if match.source is None else match.source)
        if source is not None and match.source is not None:
            self._idle[match.source] = self._idle.pop(match.source)
            copies = self._free_ids and 2 * match.length < source.length
            copies = copies and self.n_cells - self.used_cells >= match.length
            if not copies or not self.copy_length(source.length, match.length):
                return self._take_over(match.source, tokens, match.length)
        elif not self._free_ids and self._idle:
            self._evict(next(iter(self._idle)))
        if not self._free_ids or self.make_room(match.length) < match.length:
            return None
        seq_id = self._free_ids.pop(0)
        floor = 0
        if match.source is not None:
            origin = self._resident(match.source)
            origin.n_shared = match.length
            floor = max(self._tree.floor(match.source), 0 if self.can_cut(match.length) else match.length)
            self._edits.append(Copy(match.source, seq_id, match.length))
        elif match.snapshot is not None and self._snapshots is not None:
            floor = self._snapshots.floor(whole)
            self._snapshots.use(match.snapshot)
            self._edits.append(Restore(match.snapshot, seq_id, match.length))
        self._tree.add(seq_id, tokens[: match.length], adapter, floor)
        n_shared = match.length
        if self._snapshots is not None and self._n_saved:
            n_shared = max(n_shared, self._snapshots.shared(tokens, adapter))
        self._running[seq_id] = _Resident(tokens, adapter, match.length, n_shared)
        self.used_cells += match.length
        return seq_id

    def lose(self, seq_id: int, snapshot: int | None, source: int | None) -> None:
        """Forget idle `seq_id`, since its cells are not what they should be; the caller releases a running one.

        The `snapshot` they came from is bad, or `source` cannot be cut any more.
        """
        if seq_id in self._idle:
            self._drop(seq_id, self._idle.pop(seq_id))
        if snapshot is not None and self._snapshots is not None:
            self._snapshots.drop(snapshot)
        if source in self._running or source in self._idle:
            self._tree.raise_floor(source, self._resident(source).length)

    def make_room(self, cells: int) -> int:
        """Evict idle residents until `cells` are free or none is left. Returns how many of the `cells` are free."""
        while self.n_cells - self.used_cells < cells and self._idle:
            self._evict(next(iter(self._idle)))
        return max(0, min(cells, self.n_cells - self.used_cells))

    def extend(self, seq_id: int, count: int) -> None:
        """Note that sequence `seq_id` computed `count` tokens more; `make_room` found their cells."""
        resident = self._running[seq_id]
        resident.length += count
        self.used_cells += count
        self._extend_tree(seq_id, resident)

    def trim(self, seq_id: int, length: int) -> None:
        """Free the cells of a running sequence after its first `length`, if it holds more."""
        if self._running[seq_id].length > length:
            self._shorten(seq_id, self._running[seq_id], length)

    def retire(self, seq_id: int, tokens: np.ndarray) -> None:
        """Turn a finished sequence, which holds `tokens`, into an idle resident."""
        resident = self._running.pop(seq_id)
        resident.tokens = tokens
        self._extend_tree(seq_id, resident)
        self._idle[seq_id] = resident
        if self._snapshots is not None and self._snapshots.at_once:
            self._save(seq_id, resident, down_to=max(0, self.aligned(len(tokens) - 2)))

    def release(self, seq_id: int) -> None:
        """Forget a running sequence; its stream is free at once."""
        self._drop(seq_id, self._running.pop(seq_id))

    def evict_idle(self) -> bool:
        """Evict every idle resident. Returns True if there was one."""
        had = bool(self._idle)
        while self._idle:
            self._evict(next(iter(self._idle)))
        return had

    def take_edits(self) -> tuple[Edit, ...]:
        """The edits of the real cache since the last call, in order."""
        edits, self._edits = tuple(self._edits), []
        return edits

    def check(self) -> None:
        """Raise AssertionError unless ids, cells, counts and tree agree. Takes time linear in the cache's size."""
        residents = self._running | self._idle
        assert len(residents) == len(self._running) + len(self._idle), "a sequence is running and idle"
        n_streams = len(residents) + len(self._free_ids)
        assert {*residents, *self._free_ids} == set(range(n_streams)), "a stream is lost, or given twice"
        assert self.used_cells == sum(resident.length for resident in residents.values()), "cells are counted wrongly"
        assert self.used_cells <= self.n_cells, "there are more cells than the bound"
        for seq_id, resident in residents.items():
            known = self._tree.tokens(seq_id)
            assert len(known) == min(len(resident.tokens), resident.length), "the tree knows too much or too little"
            assert np.array_equal(known, resident.tokens[: len(known)]), "the tree knows other tokens"
        self._tree.check()

    def _usable(self, source: int | None, length: int) -> Match:
        """The part of a match in the tree that can be had: an idle resident can be taken over, a running one copied.

        One that holds much more is not taken over for a few tokens.
        """
        if source in self._running:
            length = self.copy_length(self._running[source].length, length)
        elif source in self._idle and length < min(MIN_GAIN, self._idle[source].length / 2):
            length = 0
        return Match(source, length) if length else Match(None, 0)

    def _resident(self, seq_id: int) -> _Resident:
        return self._running[seq_id] if seq_id in self._running else self._idle[seq_id]

    def _extend_tree(self, seq_id: int, resident: _Resident) -> None:
        known = self._tree.length(seq_id)
        if known < min(len(resident.tokens), resident.length):
            self._tree.extend(seq_id, resident.tokens[known : resident.length])

    def _take_over(self, seq_id: int, tokens: np.ndarray, length: int) -> int:
        resident = self._idle.pop(seq_id)
        if length < resident.length:
            self._save(seq_id, resident, down_to=length)
        if length < resident.length:
            self._shorten(seq_id, resident, length)
        resident.tokens, resident.n_shared = tokens, length
        self._running[seq_id] = resident
        return seq_id

    def _shorten(self, seq_id: int, resident: _Resident, length: int) -> None:
        self.used_cells -= resident.length - length
        resident.length = length
        if self._tree.length(seq_id) > length:
            self._tree.shorten(seq_id, length)
        self._edits.append(Remove(seq_id, length))

    def _evict(self, seq_id: int) -> None:
        resident = self._idle.pop(seq_id)
        self._save(seq_id, resident)
        self._drop(seq_id, resident)

    def _save(self, seq_id: int, resident: _Resident, down_to: int = 0) -> None:
        """Save what an idle resident holds, if it is worth it; it keeps its first `down_to` cells.

        A snapshot that can be cut gives every beginning. One that cannot is taken of the likely beginnings, for which
        the resident is cut.
        """
        if self._snapshots is None:
            return
        tokens = self._tree.tokens(seq_id)
        lengths = {len(tokens)}
        if not self.can_cut(len(tokens)):  # of a prompt asked again, two tokens are left to compute
            known = self._snapshots.match(tokens, resident.adapter)[1] == len(tokens)
            asked_again = len(tokens) if known else len(tokens) - 2
            lengths = {self.aligned(max(0, length)) for length in (asked_again, resident.n_shared, down_to)}
        for length in sorted(lengths, reverse=True):
            if length < max(down_to, self._tree.floor(seq_id)):
                break
            key = self._snapshots.add(tokens[:length], resident.adapter)
            if key is not None:
                if length < resident.length:
                    self._shorten(seq_id, resident, length)
                self._edits.append(Save(seq_id, key, length))
        self._n_saved = len(self._snapshots)

    def _drop(self, seq_id: int, resident: _Resident) -> None:
        self.used_cells -= resident.length
        self._tree.discard(seq_id)
        insort(self._free_ids, seq_id)
        self._edits.append(Remove(seq_id))
