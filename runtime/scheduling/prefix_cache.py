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

Every change is noted as an edit; the engine applies the edits in order to the real cache (`take_edits`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .plan import Copy, Edit, Match, Remove
from .radix_tree import RadixTree


@dataclass(eq=False, slots=True)
class _Resident:
    """A sequence in the cache: its tokens, and the cells of the first of them, in order."""

    tokens: np.ndarray
    cells: list[int] = field(default_factory=list)


class PrefixCache:
    """Bookkeeping of `n_cells` cells and `n_seq_max` sequence ids.

    Idle residents hold at most `idle_cells` that no running sequence shares.
    """

    def __init__(self, n_cells: int, n_seq_max: int, idle_cells: int) -> None:
        self._idle_cells = idle_cells
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
        """The resident that holds most of the beginning of `tokens`; the last token is always left to compute."""
        return Match(*self._tree.match(tokens[:-1], adapter))

    def can_hold(self, cells: int, match: Match) -> bool:
        """True if `cells` more fit beside the running sequences and the match once every idle one is evicted."""
        kept = self._n_running_cells
        if match.source in self._idle:
            matched = self._idle[match.source].cells[: match.length]
            kept += int((self._running_references[matched] == 0).sum())
        return self.n_cells - kept >= cells

    def admit(self, tokens: np.ndarray, match: Match, adapter: str | None = None) -> int | None:
        """Admit `tokens` with the matched prefix under a new sequence id; None if every id is running.

        The match was found under the same `adapter`.
        """
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
        if match.source is not None:
            shared = self._resident(match.source).cells[: match.length]
            self._references[shared] += 1
            self._edits.append(Copy(match.source, seq_id, match.length))
        self._tree.add(seq_id, tokens[: match.length], adapter)
        self._start_running(seq_id, _Resident(tokens, shared))
        return seq_id

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
        self._shorten(seq_id, resident, length)
        resident.tokens = tokens
        self._start_running(seq_id, resident)
        return seq_id

    def _bound_idle(self) -> None:
        while (excess := self.used_cells - self._n_running_cells - self._idle_cells) > 0:
            oldest, resident = next(iter(self._idle.items()))
            if len(self._idle) == 1 and excess < len(resident.cells):
                self._shorten(oldest, resident, len(resident.cells) - excess)
            else:
                self._evict(oldest)

    def _shorten(self, seq_id: int, resident: _Resident, length: int) -> None:
        self._dereference(resident.cells[length:])
        del resident.cells[length:]
        self._tree.shorten(seq_id, length)
        self._edits.append(Remove(seq_id, length))

    def _evict(self, seq_id: int) -> None:
        self._drop(seq_id, self._idle.pop(seq_id))

    def _drop(self, seq_id: int, resident: _Resident) -> None:
        self._dereference(resident.cells)
        self._tree.discard(seq_id)
        self._free_ids.append(seq_id)
        self._edits.append(Remove(seq_id))

    def _dereference(self, cells: list[int]) -> None:
        self._references[cells] -= 1
        self._free_cells.extend(cell for cell in cells if self._references[cell] == 0)
