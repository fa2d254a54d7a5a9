"""Bookkeeping of the unified KV cache: sequence ids, cells, shared prefixes, finished prompts kept for reuse. Pure.

    cell       0  1  2  3  4  5  6  7  8  9
    running A  ■  ■  ■  ■  ■                     a cell counts once,
    running B  ■  ■  ■        ■  ■               however many sequences share it
    idle C                          ■  ■         finished, kept for the next prompt that begins alike
    free                                  □

A resident sequence holds tokens in cells. A finished one stays resident, idle, so that the next prompt with the same
beginning need not compute it again, until its cells or its id are needed (least recently used first). Attention scans
every used cell, so idle residents slow down every step: the number of their cells is bounded.

A radix tree finds the resident that holds the beginning of a new prompt. It has the computed part of a running
sequence's prompt; the answer is added when the sequence is finished.

What an idle resident holds is saved as a snapshot before its cells are taken (`Snapshots`), and restored where a
prompt's longest match is there. Nothing is saved that stays in the cells, so that short prompts cost nothing more.

Every change is noted as an edit; the engine applies the edits in order to the real cache (`take_edits`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .plan import Copy, Edit, Match, Remove, Restore, Save
from .radix_tree import RadixTree
from .snapshots import MIN_GAIN, Snapshots


@dataclass(eq=False, slots=True)
class _Resident:
    """A sequence in the cache: its tokens, and the cells of the first of them, in order.

    Other prompts may begin with its first `n_prompt` tokens, its prompt, or share its first `n_shared` with it.
    """

    tokens: np.ndarray
    cells: list[int] = field(default_factory=list)
    adapter: str | None = None
    n_prompt: int = 0
    n_shared: int = 0


class PrefixCache:
    """Bookkeeping of `n_cells` cells and `n_seq_max` sequence ids.

    Idle residents hold at most `idle_cells` that no running sequence shares. Without `snapshots` an evicted one is
    computed again.
    """

    def __init__(self, n_cells: int, n_seq_max: int, idle_cells: int, snapshots: Snapshots | None = None) -> None:
        self._idle_cells = idle_cells
        self._snapshots = snapshots
        self._n_saved = 0 if snapshots is None else len(snapshots)
        self._references = np.zeros(n_cells, np.int32)
        self._running_references = np.zeros(n_cells, np.int32)
        self._n_running_cells = 0
        self._free_cells = list(range(n_cells - 1, -1, -1))
        self._free_ids = list(range(n_seq_max - 1, -1, -1))
        self._running: dict[int, _Resident] = {}
        self._idle: dict[int, _Resident] = {}
        self._tree = RadixTree()
        self._edits: list[Edit] = []

    @property
    def n_cells(self) -> int:
        """All cells."""
        return len(self._references)

    @property
    def used_cells(self) -> int:
        """Cells that some resident holds."""
        return self.n_cells - len(self._free_cells)

    @property
    def residents(self) -> dict[int, int]:
        """The cells that each resident holds, running or idle, by sequence id."""
        return {seq_id: len(resident.cells) for seq_id, resident in (self._running | self._idle).items()}

    def cells_held(self, seq_ids: Iterable[int]) -> int:
        """Cells that these running sequences hold in all, shared ones counted once."""
        return len(set().union(*(self._running[seq_id].cells for seq_id in seq_ids)))

    def match(self, tokens: np.ndarray, adapter: str | None = None) -> Match:
        """The longest beginning of `tokens` that is known; their last is always left to compute.

        It is a snapshot's only if that holds so much more than any resident that restoring it pays.
        """
        held = Match(*self._tree.match(tokens[:-1], adapter))
        if self._snapshots is None or len(tokens) - 1 - held.length < MIN_GAIN or not self._n_saved:
            return held
        snapshot, length = self._snapshots.match(tokens[:-1], adapter)
        return Match(None, length, snapshot) if length - held.length >= MIN_GAIN else held

    def floor(self, seq_id: int) -> int:
        """The shortest beginning of a resident that others may share."""
        return self._tree.floor(seq_id)

    def can_hold(self, cells: int, match: Match) -> bool:
        """True if `cells` more fit beside the running sequences and the match once every idle one is evicted."""
        kept = self._n_running_cells
        if match.source in self._idle:
            matched = self._idle[match.source].cells[: match.length]
            kept += int((self._running_references[matched] == 0).sum())
        return self.n_cells - kept >= cells

    def admit(self, tokens: np.ndarray, match: Match, adapter: str | None = None, *, planned: int = 0) -> int | None:
        """Admit `tokens` with the matched prefix under a new sequence id.

        None if every id is running, or a snapshot has no room beside the `planned` tokens of this step. The match was
        found under the same `adapter`.
        """
        if match.snapshot is not None:
            return self._admit_snapshot(tokens, match, adapter, planned)
        if match.source in self._idle:
            self._idle[match.source] = self._idle.pop(match.source)
        if not self._free_ids and len(self._idle) == 1 and match.source in self._idle:
            return self._take_over(match.source, tokens, match.length)
        if not self._free_ids and self._idle:
            self._evict(next(iter(self._idle)))
        if not self._free_ids:
            return None
        seq_id = self._free_ids.pop()
        shared: list[int] = []
        floor = 0
        if match.source is not None:
            source = self._resident(match.source)
            source.n_shared = match.length
            shared, floor = source.cells[: match.length], self._tree.floor(match.source)
            self._references[shared] += 1
            self._edits.append(Copy(match.source, seq_id, match.length))
        self._tree.add(seq_id, tokens[: match.length], adapter, floor)
        n_shared = match.length
        if self._snapshots is not None and self._n_saved:
            n_shared = max(n_shared, self._snapshots.shared(tokens, adapter))
        self._start_running(seq_id, _Resident(tokens, shared, adapter, len(tokens) - 1, n_shared))
        return seq_id

    def _admit_snapshot(self, tokens: np.ndarray, match: Match, adapter: str | None, planned: int) -> int | None:
        assert self._snapshots is not None
        assert match.snapshot is not None
        whole = self._snapshots.length(match.snapshot)
        if not self._free_ids and self._idle:
            self._evict(next(iter(self._idle)))
        if not self._free_ids or self.make_room(planned + whole) < planned + whole:
            return None
        if match.snapshot in self._snapshots:  # else an evicted one has taken its place
            self._snapshots.use(match.snapshot)
        seq_id = self._free_ids.pop()
        cells = [self._free_cells.pop() for _ in range(match.length)]
        self._references[cells] = 1
        self._edits.append(Restore(match.snapshot, seq_id, match.length))
        self._tree.add(seq_id, tokens[: match.length], adapter, self._snapshots.floor(whole))
        n_shared = self._snapshots.shared(tokens, adapter)
        self._start_running(seq_id, _Resident(tokens, cells, adapter, len(tokens) - 1, n_shared))
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
            self._tree.raise_floor(source, len(self._resident(source).cells))

    def make_room(self, cells: int) -> int:
        """Evict idle residents until `cells` are free or none is left. Returns how many of the `cells` are free."""
        while len(self._free_cells) < cells and self._idle:
            self._evict(next(iter(self._idle)))
        return min(cells, len(self._free_cells))

    def extend(self, seq_id: int, count: int) -> None:
        """Give sequence `seq_id` cells for the `count` tokens it computed; `make_room` found them."""
        resident = self._running[seq_id]
        for _ in range(count):
            cell = self._free_cells.pop()
            self._references[cell] = self._running_references[cell] = 1
            resident.cells.append(cell)
        self._n_running_cells += count
        self._extend_tree(seq_id, resident)

    def trim(self, seq_id: int, length: int) -> None:
        """Free the cells of a running sequence after its first `length`, if it holds more."""
        resident = self._running[seq_id]
        if len(resident.cells) > length:
            self._unmark_running(resident.cells[length:])
            self._shorten(seq_id, resident, length)
            self._bound_idle()

    def retire(self, seq_id: int, tokens: np.ndarray) -> None:
        """Turn a finished sequence, which holds `tokens`, into an idle resident, as far as the bound allows."""
        resident = self._end_running(seq_id)
        resident.tokens = tokens
        self._extend_tree(seq_id, resident)
        self._idle[seq_id] = resident
        self._bound_idle()

    def release(self, seq_id: int) -> None:
        """Forget a running sequence; the cells that it holds alone are free at once."""
        self._drop(seq_id, self._end_running(seq_id))
        self._bound_idle()

    def evict_idle(self) -> bool:
        """Evict every idle resident. Returns True if there was one."""
        had = bool(self._idle)
        self.make_room(self.n_cells)
        return had

    def take_edits(self) -> tuple[Edit, ...]:
        """The edits of the real cache since the last call, in order."""
        edits, self._edits = tuple(self._edits), []
        return edits

    def check(self) -> None:
        """Raise AssertionError unless ids, cells, counts and tree agree. Takes time linear in the cache's size."""
        residents = self._running | self._idle
        assert len(residents) == len(self._running) + len(self._idle), "a sequence is running and idle"
        n_seq_max = len(residents) + len(self._free_ids)
        assert {*residents, *self._free_ids} == set(range(n_seq_max)), "a sequence id is lost, or given twice"
        for references, holders in ((self._references, residents), (self._running_references, self._running)):
            held = [cell for resident in holders.values() for cell in resident.cells]
            assert np.array_equal(references, np.bincount(held, minlength=self.n_cells)), "a cell is counted wrongly"
        assert sorted(self._free_cells) == np.flatnonzero(self._references == 0).tolist(), "a free cell is lost or held"
        assert self._n_running_cells == np.count_nonzero(self._running_references), "running cells are counted wrongly"
        assert self.used_cells - self._n_running_cells <= self._idle_cells, "idle sequences hold more than the bound"
        for seq_id, resident in residents.items():
            known = self._tree.tokens(seq_id)
            assert len(known) == min(len(resident.tokens), len(resident.cells)), "the tree knows too much or too little"
            assert np.array_equal(known, resident.tokens[: len(known)]), "the tree knows other tokens"
        self._tree.check()

    def _resident(self, seq_id: int) -> _Resident:
        return self._running[seq_id] if seq_id in self._running else self._idle[seq_id]

    def _start_running(self, seq_id: int, resident: _Resident) -> None:
        self._running[seq_id] = resident
        self._n_running_cells += int((self._running_references[resident.cells] == 0).sum())
        self._running_references[resident.cells] += 1

    def _end_running(self, seq_id: int) -> _Resident:
        resident = self._running.pop(seq_id)
        self._unmark_running(resident.cells)
        return resident

    def _unmark_running(self, cells: list[int]) -> None:
        self._running_references[cells] -= 1
        self._n_running_cells -= int((self._running_references[cells] == 0).sum())

    def _extend_tree(self, seq_id: int, resident: _Resident) -> None:
        known = self._tree.length(seq_id)
        if known < min(len(resident.tokens), len(resident.cells)):
            self._tree.extend(seq_id, resident.tokens[known : len(resident.cells)])

    def _take_over(self, seq_id: int, tokens: np.ndarray, length: int) -> int:
        resident = self._idle.pop(seq_id)
        self._save(seq_id, resident, cut=False)
        self._shorten(seq_id, resident, length)
        resident.tokens, resident.n_prompt, resident.n_shared = tokens, len(tokens) - 1, length
        self._start_running(seq_id, resident)
        return seq_id

    def _bound_idle(self) -> None:
        while (excess := self.used_cells - self._n_running_cells - self._idle_cells) > 0:
            oldest, resident = next(iter(self._idle.items()))
            length = len(resident.cells) - excess
            if len(self._idle) == 1 and length > 0 and self._can_shorten(oldest, length):
                self._save(oldest, resident, cut=False)
                self._shorten(oldest, resident, length)
            else:
                self._evict(oldest)

    def _can_shorten(self, seq_id: int, length: int) -> bool:
        """True if the beginning of an idle resident is of use, and saves what a snapshot would give as well."""
        whole = len(self._resident(seq_id).cells)
        can_cut = self._snapshots is None or self._snapshots.floor(whole) == 0
        return can_cut and length >= self._tree.floor(seq_id)

    def _shorten(self, seq_id: int, resident: _Resident, length: int) -> None:
        self._dereference(resident.cells[length:])
        del resident.cells[length:]
        self._tree.shorten(seq_id, length)
        self._edits.append(Remove(seq_id, length))

    def _evict(self, seq_id: int) -> None:
        resident = self._idle.pop(seq_id)
        self._save(seq_id, resident, cut=True)
        self._drop(seq_id, resident)

    def _save(self, seq_id: int, resident: _Resident, *, cut: bool) -> None:
        """Save what an idle resident holds, if it is worth it; with `cut` also what others may share of it.

        A snapshot that can be cut gives every beginning. One that cannot is taken of the likely beginnings too, for
        which the resident is cut in the real cache: its cells are about to go.
        """
        if self._snapshots is None:
            return
        tokens = self._tree.tokens(seq_id)
        lengths = {len(tokens)}
        if cut and self._snapshots.floor(len(tokens)):
            lengths |= {min(length, len(tokens)) for length in (resident.n_shared, resident.n_prompt)}
        saved: list[Edit] = []
        for length in sorted(length for length in lengths if length >= self._tree.floor(seq_id)):
            key = self._snapshots.add(tokens[:length], resident.adapter)
            if key is not None:
                saved.append(Save(seq_id, key, length))
                if length < len(tokens):
                    saved.append(Remove(seq_id, length))
        self._edits += reversed(saved)
        self._n_saved = len(self._snapshots)

    def _drop(self, seq_id: int, resident: _Resident) -> None:
        self._dereference(resident.cells)
        self._tree.discard(seq_id)
        self._free_ids.append(seq_id)
        self._edits.append(Remove(seq_id))

    def _dereference(self, cells: list[int]) -> None:
        self._references[cells] -= 1
        self._free_cells.extend(cell for cell in cells if self._references[cell] == 0)
