"""Who holds which tokens in the KV cache: sequence ids, cells, shared prefixes, and what stays after an answer.

A pure ledger of the unified cache. It knows for every resident sequence the tokens it holds and the cells they lie in;
a cell counts once however many sequences share it. A finished sequence stays resident, idle, so that the next prompt
with the same beginning need not compute it again, until its cells or its id are needed (least recently used first).
Attention scans every used cell, so idle residents cost everyone: how many cells they may hold is bounded.

Changes are noted as edits, in order, for the engine to carry out on the real cache (`take_edits`).
"""

from dataclasses import dataclass, field

import numpy as np

from .sequence import Copy, Edit, Match, Remove


@dataclass(eq=False, slots=True)
class _Resident:
    tokens: np.ndarray
    cells: list[int] = field(default_factory=list)


class PrefixCache:
    """The ledger of `n_cells` cells and `n_seq_max` sequence ids.

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
    def n_idle(self) -> int:
        """Finished sequences that are still resident."""
        return len(self._idle)

    def match(self, tokens: np.ndarray) -> Match:
        """The resident that holds most of the beginning of `tokens`; the last token is always left to compute."""
        best = Match(None, 0)
        for seq_id, resident in (*self._idle.items(), *self._running.items()):
            length = common_prefix(tokens[:-1], resident.tokens[: len(resident.cells)])
            if length > best.length:
                best = Match(seq_id, length)
        return best

    def can_hold(self, cells: int, match: Match) -> bool:
        """Whether `cells` more would fit beside the running and the matched prefix if every idle one were evicted."""
        kept = self._n_running_cells
        if match.source in self._idle:
            matched = self._idle[match.source].cells[: match.length]
            kept += int((self._running_references[matched] == 0).sum())
        return self.n_cells - kept >= cells

    def admit(self, tokens: np.ndarray, match: Match) -> int | None:
        """A sequence id for `tokens`, holding the matched prefix; None if every id is running."""
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
        self._run(seq_id, _Resident(tokens, shared))
        return seq_id

    def make_room(self, cells: int) -> int:
        """Evict idle residents until `cells` are free or none is left; how many of the `cells` are free now."""
        while len(self._free_cells) < cells and self._idle:
            self._evict(next(iter(self._idle)))
        return min(cells, len(self._free_cells))

    def extend(self, seq_id: int, count: int) -> None:
        """Sequence `seq_id` computed `count` more tokens, for which there was room."""
        held = self._running[seq_id].cells
        for _ in range(count):
            cell = self._free_cells.pop()
            self._references[cell] = self._running_references[cell] = 1
            held.append(cell)
        self._n_running_cells += count

    def retire(self, seq_id: int, tokens: np.ndarray) -> None:
        """The sequence is finished: what it holds, `tokens`, stays as an idle resident, as far as the bound allows."""
        resident = self._rest(seq_id)
        resident.tokens = tokens
        self._idle[seq_id] = resident
        self._bound_idle()

    def release(self, seq_id: int) -> None:
        """Forget a running sequence; the cells that it holds alone are free at once."""
        self._drop(seq_id, self._rest(seq_id))
        self._bound_idle()

    def evict_idle(self) -> bool:
        """Evict every idle resident; whether there was one."""
        had = bool(self._idle)
        self.make_room(self.n_cells)
        return had

    def take_edits(self) -> tuple[Edit, ...]:
        """What must be done to the real cache since the last call, in order."""
        edits, self._edits = tuple(self._edits), []
        return edits

    def _resident(self, seq_id: int) -> _Resident:
        return self._running[seq_id] if seq_id in self._running else self._idle[seq_id]

    def _run(self, seq_id: int, resident: _Resident) -> None:
        self._running[seq_id] = resident
        self._n_running_cells += int((self._running_references[resident.cells] == 0).sum())
        self._running_references[resident.cells] += 1

    def _rest(self, seq_id: int) -> _Resident:
        resident = self._running.pop(seq_id)
        self._running_references[resident.cells] -= 1
        self._n_running_cells -= int((self._running_references[resident.cells] == 0).sum())
        return resident

    def _take_over(self, seq_id: int, tokens: np.ndarray, length: int) -> int:
        resident = self._idle.pop(seq_id)
        self._shorten(seq_id, resident, length)
        resident.tokens = tokens
        self._run(seq_id, resident)
        return seq_id

    def _bound_idle(self) -> None:
        while (excess := self.used_cells - self._n_running_cells - self._idle_cells) > 0:
            oldest, resident = next(iter(self._idle.items()))
            if len(self._idle) == 1 and excess < len(resident.cells):
                self._shorten(oldest, resident, len(resident.cells) - excess)
            else:
                self._evict(oldest)

    def _shorten(self, seq_id: int, resident: _Resident, length: int) -> None:
        self._let_go(resident.cells[length:])
        del resident.cells[length:]
        self._edits.append(Remove(seq_id, length))

    def _evict(self, seq_id: int) -> None:
        self._drop(seq_id, self._idle.pop(seq_id))

    def _drop(self, seq_id: int, resident: _Resident) -> None:
        self._let_go(resident.cells)
        self._free_ids.append(seq_id)
        self._edits.append(Remove(seq_id))

    def _let_go(self, cells: list[int]) -> None:
        self._references[cells] -= 1
        self._free_cells.extend(cell for cell in cells if self._references[cell] == 0)


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """How many first elements two one-dimensional arrays share."""
    length = min(len(left), len(right))
    differ = left[:length] != right[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
