"""The policy of a step: which sequences compute, and how many tokens of each. Pure: no binding, clock, thread or wire.

    step   LONG    one prompt, the first that came, up to `step_tokens` of it
    step   SHORT   a few tokens of many: ends of prompts, choices to score, tokens that a grammar forced
    step   ROWS    the next token of every answer

The kinds of steps take turns: an answer waits for one of each other kind at most. Every sequence computes in a stream
of its own, so prompts gain nothing from being computed together unless they are short. When cells run out the step does
less; when nothing at all fits, the newest sequence is pre-empted and its tokens are computed again later. The oldest
always advances, so every sequence ends.

The same sequence is computed in the same way beside any others: a prompt in chunks of two tokens or more, what
follows it in the chunks in which it came. (llama.cpp computes one token of a stream by other arithmetic than several.)
Chunks of a step have the same number of tokens, filled up with some of no meaning: llama.cpp would cut them all at the
shortest.

A step computes under one LoRA adapter; the adapters take turns (`AdapterRotation`). Streams are given first come first
served, regardless of the adapter: a request joins in order, and computes when its adapter's turn comes.
"""

from bisect import insort
from collections import deque
from dataclasses import replace

import numpy as np

from runtime.kv_cache.prefix_cache import Match, PrefixCache
from runtime.kv_cache.radix_tree import RadixTree

from .plan import AdapterRotation, Chunk, ScheduledSequence, StepKind, StepPlan

# A waiting sequence is held back while another computes a common prefix that is longer by at least this than the cached
# one. A shorter prefix is computed twice sooner than waited for.
HOLD_BACK_TOKENS = 32
# Held-back sequences that others may overtake in one step: bounds the look-ups.
LOOK_PAST = 8
# Where the real cache has room for fewer tokens than this, they are computed as they fit. Their last bits may differ.
SMALL_STEP = 3


class Scheduler:
    """Plans steps of at most `step_tokens` tokens for at most `max_running` sequences at a time.

    A step gives at most `max_rows` rows of logits (None: as many as it has tokens), which must be at least
    `max_running`. Chunks of several tokens are filled up to a multiple of `row_group`. What a finished sequence
    computed as a prompt is kept for others to share (`keep_prompts`), and what it computed as an answer if
    `keep_answers`: that differs in its last bits from the same tokens in a prompt.

    Follow each `plan` with `commit` (computed), `shrink` (no room in the real cache) or `isolate` (malformed).
    """

    def __init__(
        self,
        cache: PrefixCache,
        *,
        step_tokens: int,
        max_running: int,
        max_rows: int | None = None,
        row_group: int = 1,
        keep_prompts: bool = True,
        keep_answers: bool = False,
    ) -> None:
        self._cache = cache
        self._step_tokens = max(step_tokens - step_tokens % row_group, min(step_tokens, SMALL_STEP))
        self._row_group = row_group
        self._max_running = max_running
        self._max_rows = step_tokens if max_rows is None else max_rows
        self._keep_prompts = keep_prompts
        self._keep_answers = keep_answers
        self._limit = self._step_tokens
        self._tokens: dict[int, np.ndarray] = {}
        self._promised = RadixTree()  # by arrival: the running sequences' prompts, computed already or soon
        self._by_arrival: dict[int, ScheduledSequence] = {}
        self._stops: dict[int, int] = {}  # by arrival: where a prompt is cut, so that others can copy what it holds
        self._suspects: deque[ScheduledSequence] = deque()
        self._blamed: ScheduledSequence | None = None
        self._full = False  # the real cache had no room for all that ran
        self._rotation = AdapterRotation()
        self._last_step: dict[int, int] = {}  # by arrival: the step that computed it last
        self._n_steps = 0
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

    def spare(self, plan: StepPlan, max_rows: int) -> int:
        """Tokens, each with a row of logits, that could be added to a step of `max_rows`; 0 unless it only decodes.

        They displace nothing: no prompt, no idle prefix, and not the search for a guilty sequence.
        """
        if self._suspects or not all(chunk.count == chunk.n_rows == 1 for chunk in plan.chunks):
            return 0
        free = self._cache.n_cells - self._cache.used_cells
        return max(min(self._limit, max_rows, free) - plan.n_tokens, 0)

    def commit(self, plan: StepPlan) -> None:
        """Note that the plan was computed."""
        self._limit = min(self._step_tokens, self._limit * 2)
        self._n_steps += 1
        self._blamed = None
        self._rotation.computed(plan.adapter, plan.n_tokens, plan.chunks[0].sequence.kind)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            self._last_step[sequence.arrival] = self._n_steps
            if not sequence.is_prompt and chunk.start == (sequence.cuts or [sequence.n_base])[-1]:
                end = chunk.start + chunk.count  # each draft is a row of its own
                sequence.cuts += range(end - len(chunk.drafts), end + 1)
            self._cache.extend(chunk.seq_id, chunk.count)
            sequence.n_computed += chunk.count

    def trim(self, sequence: ScheduledSequence, length: int) -> None:
        """Take back the computed tokens of a running sequence after its first `length`, if there are any."""
        if sequence.n_computed > length:
            assert sequence.seq_id is not None
            self._cache.trim(sequence.seq_id, length)
            sequence.n_computed = length
            while sequence.cuts and sequence.cuts[-1] > length:
                sequence.cuts.pop()

    def shrink(self, plan: StepPlan) -> bool:
        """Plan less next time, since the real cache had no room for the plan. False if nothing less is possible."""
        if self._cache.evict_idle():
            return True
        if plan.n_tokens > 1:
            self._limit = plan.n_tokens // 2
            return True
        if len(self.running) > 1:
            self._preempt(self.running[-1])
            self._full = True
            return True
        return False

    def isolate(self, plan: StepPlan) -> bool:
        """Run the failed plan's sequences one by one next, to find the guilty one: it fails twice alone.

        False if that is what it did.
        """
        if len(plan.chunks) == 1:
            guilty = plan.chunks[0].sequence
            again, self._blamed = self._blamed is not guilty, guilty
            if again:
                self._suspects.appendleft(guilty)
            return again
        self._suspects = deque(chunk.sequence for chunk in plan.chunks)
        return True

    def lose(self, seq_id: int, snapshot: int | None = None, source: int | None = None) -> None:
        """Compute again what is not whole in the cells of `seq_id`, which came from `snapshot` or `source`."""
        for sequence in self.running[:]:
            if sequence.seq_id == seq_id:
                self._preempt(sequence)
        self._cache.lose(seq_id, snapshot, source)

    def finish(self, sequence: ScheduledSequence) -> None:
        """End a complete sequence; its prompt stays in the cache for others to share."""
        assert sequence.seq_id is not None
        if not self._keep_prompts:
            self.drop(sequence)
            return
        self.trim(sequence, len(sequence.tokens) if self._keep_answers else sequence.n_base)
        self._cache.retire(sequence.seq_id, np.asarray(sequence.tokens[: sequence.n_computed], np.int32))
        self._forget(sequence)

    def drop(self, sequence: ScheduledSequence) -> None:
        """End a sequence that failed or was cancelled, waiting or running; its cells are free with the next edits."""
        if sequence.seq_id is not None:
            self._cache.release(sequence.seq_id)
        self._forget(sequence)

    def clear(self) -> None:
        """Forget all sequences: the engine is dead, and plans nothing more."""
        self.waiting.clear()
        self.running.clear()

    def _forget(self, sequence: ScheduledSequence) -> None:
        (self.waiting if sequence.seq_id is None else self.running).remove(sequence)
        self._full = self._full and sequence.seq_id is None
        self._leave(sequence)
        self._rotation.leave(sequence.adapter)
        sequence.seq_id = None
        del self._tokens[sequence.arrival]

    def _leave(self, sequence: ScheduledSequence) -> None:
        """Forget what is noted of a running sequence."""
        self._promised.discard(sequence.arrival)
        self._by_arrival.pop(sequence.arrival, None)
        self._stops.pop(sequence.arrival, None)
        self._last_step.pop(sequence.arrival, None)

    def _next_suspect(self) -> list[Chunk]:
        while self._suspects:
            suspect = self._suspects.popleft()
            chunk = self._chunk(suspect, []) if suspect.seq_id is not None else None
            if chunk is not None:
                return [chunk]
        return []

    def _in_rotation(self, *, join: bool) -> list[Chunk]:
        """The chunks of the first adapter in the rotation that has something to compute."""
        if join:
            self._join_waiting()
        for adapter in self._rotation.order:
            if chunks := self._chunks(adapter):
                return chunks
        return []

    def _chunks(self, adapter: str | None) -> list[Chunk]:
        """The next chunks under `adapter`, of the kind that is due."""
        mine = [sequence for sequence in self.running if sequence.adapter == adapter]
        last = self._rotation.kind(adapter)
        for kind in sorted(StepKind, key=lambda kind: (kind <= last, kind)):
            some = [sequence for sequence in mine if sequence.kind is kind]
            if chunks := self._long_chunk(some) if kind is StepKind.LONG else self._short_chunks(some):
                return chunks
        return []

    def _long_chunk(self, sequences: list[ScheduledSequence]) -> list[Chunk]:
        """A chunk of the oldest that fits."""
        chunk = next(filter(None, (self._chunk(sequence, []) for sequence in sequences)), None)
        return [] if chunk is None else self._filled([chunk])

    def _short_chunks(self, sequences: list[ScheduledSequence]) -> list[Chunk]:
        """The next chunk of as many as fit, those that wait longest first, filled up to the longest of them."""
        chunks: list[Chunk] = []
        for sequence in sorted(sequences, key=lambda sequence: self._last_step.get(sequence.arrival, 0)):
            widths = [sequence.n_wanted, *(chunk.count for chunk in chunks)]
            if max(widths) > 2 * min(widths) + 2 or (chunks and len(widths) * self._width(max(widths)) > self._limit):
                continue
            if chunk := self._chunk(sequence, chunks):
                chunks.append(chunk)
        return self._filled(chunks)

    def _filled(self, chunks: list[Chunk]) -> list[Chunk]:
        width = self._width(max((chunk.count for chunk in chunks), default=1))
        chunks.sort(key=lambda chunk: chunk.seq_id)  # llama.cpp cuts a step where streams are out of order
        return [replace(chunk, n_pad=width - chunk.count) for chunk in chunks]

    def _width(self, count: int) -> int:
        return count if count == 1 else -(-count // self._row_group) * self._row_group

    def _join_waiting(self) -> None:
        """Move waiting sequences to the running, as streams and cells allow; one if the real cache was full."""
        n_held_back = 0
        self._full = self._full and bool(self.running)
        most = 1 if self._full or self._limit < self._step_tokens else self._max_running
        for sequence in self.waiting[:]:
            if len(self.running) >= most or n_held_back >= LOOK_PAST:
                break
            match = self._match(sequence)
            if match is None:
                n_held_back += 1
            elif not self._join(sequence, match):
                break

    def _chunk(self, sequence: ScheduledSequence, others: list[Chunk]) -> Chunk | None:
        """The next chunk of `sequence` beside the `others`; None if it does not fit."""
        start, planned = sequence.n_computed, sum(chunk.count for chunk in others)
        without_rows = max(sequence.row_from - start, 0)
        rows_left = self._max_rows - sum(chunk.n_rows for chunk in others)
        room = self._cache.make_room(planned + min(self._limit, sequence.n_wanted)) - planned
        most = min(self._limit - planned, without_rows + rows_left, room)
        if not sequence.is_prompt:
            size = min(sequence.n_wanted, self._limit, without_rows + self._max_rows)
            size = size if size <= most else 0
        elif self._limit < SMALL_STEP:
            size = min(most, sequence.n_wanted)
        else:
            size = sequence.leaving_two(self._up_to_stop(sequence, sequence.n_wanted), most)
        return Chunk(sequence, start, size, max(size - without_rows, 0)) if size > 0 else None

    def _up_to_stop(self, sequence: ScheduledSequence, wanted: int) -> int:
        stop = self._stops.get(sequence.arrival, 0) - sequence.n_computed
        return min(wanted, stop) if stop > 1 else wanted

    def _match(self, sequence: ScheduledSequence) -> Match | None:
        """The cached prefix that `sequence` would start from; None if a running one is computing a much longer one."""
        tokens = self._shareable(sequence)
        match = self._cache.match(tokens, sequence.adapter)
        source, promised = self._promised.match(tokens, sequence.adapter)
        if source is None or promised - match.length < HOLD_BACK_TOKENS:
            return match
        other = self._by_arrival[source]
        if other.n_computed >= promised:
            return match
        if not self._cache.can_cut(other.n_base):
            stop = self._cache.aligned(promised)
            if stop - match.length < HOLD_BACK_TOKENS or other.n_computed >= stop:
                return match
            self._stops[source] = stop
        return None

    def _shareable(self, sequence: ScheduledSequence) -> np.ndarray:
        """The tokens that `sequence` may find in the cache: of a prompt, two are left, and all with logits."""
        tokens = self._tokens[sequence.arrival]
        prompt = sequence.n_base if len(tokens) > sequence.n_base else sequence.n_base - 2
        return tokens[: max(0, min(prompt, sequence.row_from))]

    def _join(self, sequence: ScheduledSequence, match: Match) -> bool:
        """Move `sequence` to the running if there is a stream and, unless it would run alone, room for its tokens."""
        needed = len(sequence.tokens) + sum(running.n_outstanding for running in self.running)
        if self.running and not self._cache.can_hold(needed):
            return False
        tokens = self._tokens[sequence.arrival][: sequence.n_base]
        seq_id = self._cache.admit(tokens, match, sequence.adapter)
        if seq_id is None:
            return False
        self._promised.add(sequence.arrival, tokens, sequence.adapter, self._cache.floor(seq_id))
        self._by_arrival[sequence.arrival] = sequence
        found = min(match.length, sequence.n_prompt)
        sequence.n_cached = found if sequence.n_generated == sequence.n_ahead else min(found, sequence.n_cached)
        sequence.seq_id, sequence.n_computed = seq_id, match.length
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_arrival)
        return True

    def _preempt(self, sequence: ScheduledSequence) -> None:
        assert sequence.seq_id is not None
        self._cache.release(sequence.seq_id)
        self._leave(sequence)
        self.running.remove(sequence)
        sequence.seq_id, sequence.n_computed = None, 0
        self.n_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: ScheduledSequence) -> None:
        self._tokens[sequence.arrival] = np.asarray(sequence.tokens, np.int32)
        insort(self.waiting, sequence, key=_arrival)


def _arrival(sequence: ScheduledSequence) -> int:
    return sequence.arrival
