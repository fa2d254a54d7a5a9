"""One `llama_decode`: the memory of its batch, the errors of its codes, what keeps its bits, and two without an engine.

llama.cpp multiplies matrices by other sums where other numbers of rows are computed together: K-quants in groups of 16,
the rest in other ways; float16 one row in another way than several. So that a token's bits do not depend on its
company, chunks are filled up to such groups, and a row alone is given a neighbour. A few tokens show what is needed.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
from llama_cpp import llama_cpp

from runtime.errors import BatchInvalid, DecodeAborted, DecodeFailed, EngineError, NoKvSlot

from .interface import Batch, LlamaLike


class BatchArrays:
    """The memory of a `llama_batch`, kept from step to step and filled by array assignment."""

    def __init__(self, n_batch: int) -> None:
        self._tokens = np.zeros(n_batch, np.int32)
        self._positions = np.zeros(n_batch, np.int32)
        self._seq_ids = np.zeros(n_batch, np.int32)
        self._wants_logits = np.zeros(n_batch, np.int8)
        self._n_seq_ids = np.ones(n_batch, np.int32)
        self._seq_id_pointers = self._seq_ids.ctypes.data + 4 * np.arange(n_batch, dtype=np.uintp)
        self._batch = llama_cpp.llama_batch(
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._n_seq_ids, ctypes.c_int32),
            seq_id=_pointer(self._seq_id_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wants_logits, ctypes.c_int8),
        )

    def fill(self, batch: Batch) -> llama_cpp.llama_batch:
        """The binding's form of `batch`, valid until the next call."""
        n_tokens = len(batch.tokens)
        self._tokens[:n_tokens] = batch.tokens
        self._positions[:n_tokens] = batch.positions
        self._seq_ids[:n_tokens] = batch.seq_ids
        self._wants_logits[:n_tokens] = batch.wants_logits
        self._batch.n_tokens = n_tokens
        return self._batch


def decode_error(code: int, n_tokens: int) -> EngineError:
    """The error for a code of `llama_decode` that is not 0."""
    kinds = {1: NoKvSlot, 2: DecodeAborted, -1: BatchInvalid}
    return kinds.get(code, DecodeFailed)(f"llama_decode gave {code} for a batch of {n_tokens} tokens")


# Tried as `row_group`, and the tokens to try it with.
ROW_GROUPS = (1, 16)
TRIED_TOKENS = 19


def row_group(llama: LlamaLike) -> int:
    """The `ModelInfo.row_group` of a model with streams; 1 if none helps. Empties the cache."""
    for group in ROW_GROUPS:
        if np.array_equal(_last_row(llama, (), group), _last_row(llama, (2,), group)):
            return group
    return 1


def rows_can_be_alone(llama: LlamaLike) -> bool:
    """True if a row alone has the bits that it has beside another. Empties the cache."""
    cut = TRIED_TOKENS - 1
    alone = _last_row(llama, (cut,), 1)
    _last_row(llama, (cut,), 1, end=cut)
    token, place = np.array([cut * 7919 % llama.info.n_vocab], np.int32), np.array([cut], np.int32)
    batch = with_company(Batch(token, place, np.zeros(1, np.int32), np.ones(1, np.int8)), 1, 0)
    return np.array_equal(llama.decode(batch)[0], alone)


def neighbour(seq_id: int, n_seq_max: int) -> int | None:
    """A stream beside that of `seq_id`, with which it can be computed at once; None if there is only one."""
    return seq_id + 1 if seq_id + 1 < n_seq_max else seq_id - 1 if seq_id else None


def with_company(batch: Batch, seq_id: int, position: int) -> Batch:
    """The batch of one row with a row of sequence `seq_id` at `position` beside it, which gives no logits."""
    before = seq_id < batch.seq_ids[0]
    added = (0, position, seq_id, 0)
    arrays = (batch.tokens, batch.positions, batch.seq_ids, batch.wants_logits)
    return Batch(*(np.insert(array, 0 if before else 1, value) for array, value in zip(arrays, added, strict=True)))


def _last_row(llama: LlamaLike, cuts: Sequence[int], group: int, end: int = TRIED_TOKENS) -> np.ndarray:
    """The logits after the first `end` tokens, computed in pieces that end at `cuts` and are filled up to groups."""
    llama.clear()
    row = np.empty(0, np.float32)
    ends = sorted({*cuts, end})
    for start, stop in zip((0, *ends), ends, strict=False):
        count = stop - start
        width = count if count == 1 else -(-count // group) * group
        places = np.arange(start, start + width, dtype=np.int32)
        wanted = places == stop - 1
        batch = Batch(places * 7919 % llama.info.n_vocab, places, np.zeros(width, np.int32), wanted)
        row = np.array(llama.decode(batch)[0])
        llama.remove(0, stop)
    return row


def _pointer(array: np.ndarray, kind: type) -> object:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def last_logits(llama: LlamaLike, tokens: Sequence[int]) -> np.ndarray:
    """Prefill `tokens` (1 … n_batch) as sequence 0 of an empty cache; the last one's logits, shape (n_vocab,)."""
    n_tokens = len(tokens)
    wants_logits = np.zeros(n_tokens, dtype=bool)
    wants_logits[-1] = True
    llama.clear()
    logits = llama.decode(
        Batch(
            tokens=np.asarray(tokens, dtype=np.int32),
            positions=np.arange(n_tokens, dtype=np.int32),
            seq_ids=np.zeros(n_tokens, dtype=np.int32),
            wants_logits=wants_logits,
        )
    )
    return np.array(logits[0])


def greedy_answer(llama: LlamaLike, prompt: Sequence[int], limit: int) -> list[int]:
    """Decode greedily at most `limit` tokens after `prompt`, without the end token, as sequence 0 of an empty cache."""
    llama.clear()
    answer: list[int] = []
    pending, position = list(prompt), 0
    while len(answer) < limit:
        best = _likeliest(llama, pending, position)
        if llama.tokenizer.is_end(best):
            break
        answer.append(best)
        position += len(pending)
        pending = [best]
    return answer


def _likeliest(llama: LlamaLike, tokens: Sequence[int], position: int) -> int:
    """Decode `tokens` from `position` on, in as many batches as they need; the likeliest token after them."""
    step = llama.info.n_batch
    logits = np.empty((0, 0), np.float32)
    for start in range(0, len(tokens), step):
        part = np.asarray(tokens[start : start + step], np.int32)
        wants_logits = np.zeros(len(part), bool)
        wants_logits[-1] = start + step >= len(tokens)
        positions = np.arange(len(part), dtype=np.int32) + position + start
        logits = llama.decode(Batch(part, positions, np.zeros(len(part), np.int32), wants_logits))
    return int(logits[0].argmax())
