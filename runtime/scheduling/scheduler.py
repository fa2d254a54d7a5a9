"""The policy of a step: which sequences compute, and how many tokens of each. Pure: no binding, clock, thread or wire.

    step_tokens   ├─ decode rows ─┼─ chunks of running prompts ─┼─ waiting sequences that join ─┤
                   one token each      first come first served        while slots and cells last

Where one step for rows and prompts costs more than two (`mix_cells`), they take turns instead: an answer waits for one
prefill at most, a prompt for one step of rows. When cells run out the step does less; when nothing at all fits, the
newest sequence is pre-empted and its tokens are computed again later. The oldest always advances, so every sequence
ends.

A step computes under one LoRA adapter; the adapters take turns (`AdapterRotation`). Slots and cells are given first
come first served, regardless of the adapter: a request joins in order, and computes when its adapter's turn comes.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .plan import Chunk, Match, ScheduledSequence, StepPlan
from .prefix_cache import PrefixCache
from .radix_tree import RadixTree

# A waiting sequence is held back while another computes a common prefix that is longer by at least this than the cached
# one. A shorter prefix is computed twice sooner than waited for.
HOLD_BACK_TOKENS = 32
# Held-back sequences that others may overtake in one step: bounds the look-ups.
LOOK_PAST = 8
# Cells kept free for each running answer when another joins, so that it is not pre-empted a moment later.
HEADROOM_TOKENS = 16
# A sequence with at most this many tokens to compute counts as rows, not as a prompt: a sampled token with those that a
# grammar forces after it, a choice to score, the end of a prompt. It holds many cells for so few tokens.
FEW_TOKENS = 16
# llama.cpp's CPU attention goes through a step of fewer tokens cell by cell and reads only a row's own; through a
# larger one in tiles of this many tokens, each of which reads every cell that any of its rows holds.
TILE_TOKENS = 64
# An adapter's turn lasts until this many tokens were computed, a step counting as `STEP_TOKENS` at least: four steps of
# a few rows, two of sixteen, one that prefills. A change of adapter makes llama.cpp reserve its buffers again (4-5 ms,
# Gemma 3 270M, Q4_K_M, on 2 idle Xeon cores, a third of a step of one row; 7-9 ms in all before one of sixteen, a sixth
# of it), and the answers under other adapters wait for as long as a turn lasts.
TURN_TOKENS = 32
STEP_TOKENS = 8


class Scheduler:
    """Plans steps of at most `step_tokens` tokens for at most `max_running` sequences at a time.

    A step gives at most `max_rows` rows of logits (None: as many as it has tokens), which must be at least
    `max_running`. Rows and prompts share a step of `TILE_TOKENS` or more only while the rows' sequences hold at most
    `mix_cells` cells in all (None: always).

    A logit's last bits depend on how many tokens are computed together, and on what else the cache holds. With
    `whole_chunk`, `max_running` and the cache's ids must be one, and a step depends on its sequence alone: every chunk
    ends at a multiple of `whole_chunk` or with the known tokens, and only whole chunks are kept for others to share, so
    that a prompt found in the cache was computed in the chunks in which it would be computed now.

    Follow each `plan` with `commit` (computed), `shrink` (no room in the real cache) or `isolate` (malformed).
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        step_tokens: int,
        max_running: int,
        max_rows: int | None = None,
        mix_cells: int | None = None,
        whole_chunk: int | None = None,
    ) -> None:
        self._cache = cache
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._max_rows = step_tokens if max_rows is None else max_rows
        self._mix_cells = mix_cells
        self._whole_chunk = whole_chunk
        self._limit = step_tokens
        self._tokens: dict[int, np.ndarray] = {}
        self._promised = RadixTree()  # by arrival: the running sequences' tokens, computed already or soon
        self._suspects: deque[ScheduledSequence] = deque()
        self._rotation = AdapterRotation()
        self.waiting: list[ScheduledSequence] = []
        self.running: list[ScheduledSequence] = []
        self.n_preemptions = 0

    @property
    def has_work(self) -> bool:
        """True while a sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: ScheduledSequence) -> None:
        """Queue a new sequence."""
        self._rotation.join(sequence.adapter)
        self._wait(sequence)

    def plan(self) -> StepPlan | None:
        """The next step, or None when there is nothing to do."""
        chunks = self._next_suspect() or self._in_rotation(join=True)
        while not chunks and self.running:
            self._preempt(self.running[-1])
            chunks = self._in_rotation(join=not self.running)
        if not chunks:
            return None
        return StepPlan(self._cache.take_edits(), tuple(chunks), chunks[0].sequence.adapter)

    def spare(self, plan: StepPlan) -> int:
        """Tokens, each with a row of logits, that could be added to the step; 0 unless it only decodes.

        They displace nothing: no prompt, no idle prefix, and not the search for a guilty sequence.
        """
        if self._suspects or not all(chunk.count == chunk.n_rows == 1 for chunk in plan.chunks):
            return 0
        free = self._cache.n_cells - self._cache.used_cells
        return max(min(self._limit, self._max_rows, free) - plan.n_tokens, 0)

    def commit(self, plan: StepPlan) -> None:
        """Note that the plan was computed."""
        self._limit = min(self._step_tokens, self._limit * 2)
        prefilled = not all(_has_few_left(chunk.sequence) for chunk in plan.chunks)
        self._rotation.computed(plan.adapter, plan.n_tokens, prefilled=prefilled)
        for chunk in plan.chunks:
            assert chunk.sequence.seq_id is not None
            self._cache.extend(chunk.sequence.seq_id, chunk.count)
            chunk.sequence.n_computed += chunk.count
            if chunk.start == chunk.sequence.n_whole and chunk.count == self._whole_chunk:
                chunk.sequence.n_whole += chunk.count

    def trim(self, sequence: ScheduledSequence, length: int) -> None:
        """Take back the computed tokens of a running sequence after its first `length`, if there are any."""
        if sequence.n_computed > length:
            assert sequence.seq_id is not None
            self._cache.trim(sequence.seq_id, length)
            sequence.n_computed = length

    def shrink(self, plan: StepPlan) -> bool:
        """Plan less next time, since the real cache had no room for the plan. False if nothing less is possible."""
        if self._cache.evict_idle():
            return True
        if plan.n_tokens > 1:
            self._limit = plan.n_tokens // 2
            return True
        if len(self.running) > 1:
            self._preempt(self.running[-1])
            return True
        return False

    def isolate(self, plan: StepPlan) -> bool:
        """Run the failed plan's sequences one by one next, to find the guilty one. False if there was only one."""
        if len(plan.chunks) == 1:
            return False
        self._suspects = deque(chunk.sequence for chunk in plan.chunks)
        return True

    def lose(self, seq_id: int, snapshot: int | None = None, source: int | None = None) -> None:
        """Compute again what is not whole in the cells of `seq_id`, which came from `snapshot` or `source`."""
        for sequence in self.running[:]:
            if sequence.seq_id == seq_id:
                self._preempt(sequence)
        self._cache.lose(seq_id, snapshot, source)

    def finish(self, sequence: ScheduledSequence) -> None:
        """End a complete sequence; its computed tokens stay in the cache for others to share."""
        self._retire(sequence)
        self._forget(sequence)

    def drop(self, sequence: ScheduledSequence) -> None:
        """End a sequence that failed or was cancelled, waiting or running; its cells are free with the next edits.

        Whole chunks are kept all the same: with one sequence id, no other resident holds the beginning that it shared.
        """
        if sequence.seq_id is not None:
            if self._whole_chunk is None:
                self._cache.release(sequence.seq_id)
            else:
                self._retire(sequence)
        self._forget(sequence)

    def clear(self) -> None:
        """Forget all sequences: the engine is dead, and plans nothing more."""
        self.waiting.clear()
        self.running.clear()

    def _retire(self, sequence: ScheduledSequence) -> None:
        assert sequence.seq_id is not None
        self.trim(sequence, len(sequence.tokens) if self._whole_chunk is None else sequence.n_whole)
        self._cache.retire(sequence.seq_id, np.asarray(sequence.tokens[: sequence.n_computed], np.int32))

    def _forget(self, sequence: ScheduledSequence) -> None:
        (self.waiting if sequence.seq_id is None else self.running).remove(sequence)
        self._promised.discard(sequence.arrival)
        self._rotation.leave(sequence.adapter)
        sequence.seq_id = None
        del self._tokens[sequence.arrival]

    def _next_suspect(self) -> list[Chunk]:
        while self._suspects:
            suspect = self._suspects.popleft()
            chunk = self._chunk(suspect, []) if suspect.seq_id is not None else None
            if chunk is not None:
                return [chunk]
        return []

    def _in_rotation(self, *, join: bool) -> list[Chunk]:
        """The chunks of the first adapter in the rotation that has something to compute."""
        for adapter in self._rotation.order:
            if chunks := self._chunks(adapter, join=join):
                return chunks
            join = False  # every sequence that could join has joined
        return []

    def _chunks(self, adapter: str | None, *, join: bool) -> list[Chunk]:
        """The next chunks under `adapter`: rows and prompts together, or only the kind that is due.

        Prompts are planned beside the rows even if they are computed alone, so that there are cells for both.
        """
        mine = [sequence for sequence in self.running if sequence.adapter == adapter]
        chunks = self._fill(sorted(filter(_has_few_left, mine), key=_is_prefilling), [])
        chunks = self._fill([sequence for sequence in mine if not _has_few_left(sequence)], chunks)
        if join:
            chunks = self._with_waiting(chunks, adapter)
        rows = [chunk for chunk in chunks if _has_few_left(chunk.sequence)]
        if len(rows) in (0, len(chunks)) or self._mixes(rows, _planned(chunks)):
            return chunks
        if self._rotation.prefilled(adapter):
            return rows
        return [chunk for chunk in chunks if not _has_few_left(chunk.sequence)]

    def _mixes(self, rows: list[Chunk], n_tokens: int) -> bool:
        """True if one step of `n_tokens` with these rows costs no more than two, one for rows and one for prompts."""
        if self._mix_cells is None or n_tokens < TILE_TOKENS:
            return True
        seq_ids = [chunk.sequence.seq_id for chunk in rows if chunk.sequence.seq_id is not None]
        return self._cache.cells_held(seq_ids) <= self._mix_cells

    def _fill(self, sequences: Iterable[ScheduledSequence], others: list[Chunk]) -> list[Chunk]:
        """The `others`, followed by a chunk of each running sequence, as far as there is room."""
        chunks = others[:]
        for sequence in sequences:
            if chunk := self._chunk(sequence, chunks):
                chunks.append(chunk)
        return chunks

    def _with_waiting(self, others: list[Chunk], adapter: str | None) -> list[Chunk]:
        """The `others`, followed by chunks of waiting sequences, which join as slots and cells allow."""
        chunks = others[:]
        n_held_back = 0
        for sequence in self.waiting[:]:
            if _planned(chunks) >= self._limit or len(self.running) >= self._max_running or n_held_back >= LOOK_PAST:
                break
            match = self._match(sequence)
            if match is None:
                n_held_back += 1
            elif not self._join(sequence, match, _planned(chunks)):
                break
            elif sequence.adapter == adapter:
                if not (chunk := self._chunk(sequence, chunks)):
                    break
                chunks.append(chunk)
        return chunks

    def _chunk(self, sequence: ScheduledSequence, others: list[Chunk]) -> Chunk | None:
        """The largest chunk of `sequence` beside the `others` that tokens, rows and cells allow; None if none fits."""
        start, planned = sequence.n_computed, _planned(others)
        without_rows = max(_first_row(sequence) - start, 0)
        rows_left = self._max_rows - sum(chunk.n_rows for chunk in others)
        wanted = min(len(sequence.tokens) - start, self._limit - planned, without_rows + rows_left)
        if self._whole_chunk is not None:
            wanted = min(wanted, self._whole_chunk - start % self._whole_chunk)
        count = self._cache.make_room(planned + wanted) - planned
        return Chunk(sequence, start, count, max(count - without_rows, 0)) if count > 0 else None

    def _match(self, sequence: ScheduledSequence) -> Match | None:
        """The cached prefix that `sequence` would start from; None if a running one is computing a much longer one."""
        tokens = self._tokens[sequence.arrival][: _first_row(sequence) + 1]
        match = self._cache.match(tokens, sequence.adapter)
        if self._whole_chunk is not None:
            whole = match.length - match.length % self._whole_chunk
            match = Match(match.source, whole) if whole else Match(None, 0)
        _, promised = self._promised.match(tokens[:-1], sequence.adapter)
        return match if promised - match.length < HOLD_BACK_TOKENS else None

    def _join(self, sequence: ScheduledSequence, match: Match, planned: int) -> bool:
        """Move `sequence` to the running if there is an id and, unless it would run alone, room for all its tokens."""
        shared = 0 if match.source is None else match.length
        needed = len(sequence.tokens) - shared + sum(map(_outstanding, self.running))
        if self.running and not self._cache.can_hold(needed, match):
            return False
        tokens, adapter = self._tokens[sequence.arrival], sequence.adapter
        seq_id = self._cache.admit(tokens, match, adapter, planned=planned)
        if seq_id is None:
            return False
        self._promised.add(sequence.arrival, tokens, adapter, self._cache.floor(seq_id))
        found = min(match.length, sequence.n_prompt)
        sequence.n_cached = found if sequence.n_generated == sequence.n_ahead else min(found, sequence.n_cached)
        sequence.seq_id, sequence.n_computed, sequence.n_whole = seq_id, match.length, match.length
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        return True

    def _preempt(self, sequence: ScheduledSequence) -> None:
        assert sequence.seq_id is not None
        self._cache.release(sequence.seq_id)
        self._promised.discard(sequence.arrival)
        self.running.remove(sequence)
        sequence.seq_id, sequence.n_computed = None, 0
        self.n_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: ScheduledSequence) -> None:
        self._tokens[sequence.arrival] = np.asarray(sequence.tokens, np.int32)
        insort(self.waiting, sequence, key=_arrival)


@dataclass(slots=True)
class _AdapterGroup:
    """The live sequences under one adapter: their number, the tokens of its turn so far, and its last step's kind."""

    live: int = 0
    spent: int = 0
    prefilled: bool = False


class AdapterRotation:
    """Round robin over LoRA adapters (None: the bare model): one adapter is active per step.

    Only adapters with live sequences take part; the first in `order` has the turn.
    """

    def __init__(self) -> None:
        self._groups: dict[str | None, _AdapterGroup] = {}

    @property
    def order(self) -> tuple[str | None, ...]:
        """Every adapter with a live sequence, in the order in which they may compute."""
        return tuple(self._groups)

    def join(self, adapter: str | None) -> None:
        """Count one more sequence under `adapter`."""
        self._groups.setdefault(adapter, _AdapterGroup()).live += 1

    def leave(self, adapter: str | None) -> None:
        """Count one sequence less under `adapter`."""
        self._groups[adapter].live -= 1
        if self._groups[adapter].live == 0:
            del self._groups[adapter]

    def prefilled(self, adapter: str | None) -> bool:
        """True if the last step under `adapter` computed prompts."""
        return self._groups[adapter].prefilled

    def computed(self, adapter: str | None, n_tokens: int, *, prefilled: bool) -> None:
        """Charge a step of `n_tokens` to `adapter`'s turn; `prefilled` if prompts were among them."""
        group = self._groups[adapter]
        group.prefilled = prefilled
        group.spent += max(n_tokens, STEP_TOKENS)
        if group.spent >= TURN_TOKENS:
            group.spent = 0
            self._groups[adapter] = self._groups.pop(adapter)


def _arrival(sequence: ScheduledSequence) -> int:
    return sequence.arrival


def _first_row(sequence: ScheduledSequence) -> int:
    """Place of the first token that needs logits. A cached token gives none, so a match must end before it."""
    return len(sequence.tokens) - 1 if sequence.first_row is None else sequence.first_row


def _planned(chunks: list[Chunk]) -> int:
    return sum(chunk.count for chunk in chunks)


def _is_prefilling(sequence: ScheduledSequence) -> bool:
    return len(sequence.tokens) - sequence.n_computed > 1


def _has_few_left(sequence: ScheduledSequence) -> bool:
    return len(sequence.tokens) - sequence.n_computed <= FEW_TOKENS


def _outstanding(sequence: ScheduledSequence) -> int:
    """Cells that a running sequence will soon need: the rest of its prompt and a bit of its answer."""
    answer = sequence.max_tokens - sequence.n_generated
    return len(sequence.tokens) - sequence.n_computed + min(answer, HEADROOM_TOKENS)
