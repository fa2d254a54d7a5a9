"""One `llama_decode`: the memory of its batch, the errors of its codes, what keeps its bits, and two without an engine.

llama.cpp multiplies matrices by other sums where other numbers of rows are computed together: K-quants in groups of 16,
the rest in other ways; float16 one row in another way than several. So that a token's bits do not depend on its
company, chunks are filled up to such groups, and rows of answers to pairs of streams. A few tokens show what it takes.
Four answers and more under K-quants differ from fewer all the same: to compute eight rows for one would cost too much.

Where each sequence has a stream, llama.cpp computes together what lies in consecutive streams, in their order, and the
next such run after it: the rows of a step come sorted, and small gaps between them are filled.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest

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


# Tried as `row_group` and as `row_block`, and the tokens and rows to try them with.
ROW_GROUPS = (1, 16)
ROW_BLOCKS = (1, 2)
TRIED_TOKENS = 19
TRIED_ROWS = 2
# Streams between two rows that are computed for nothing, sooner than to go through the weights twice: a step of one row
# takes 11 ms, sixteen take 65, so a row more takes 3.6 (email-triage at 120 tokens, two AVX2 cores).
MAX_GAP = 3
# So many rows are multiplied by K-quants in another way than fewer.
SEVERAL = 4
# Numbers of rows tried as `rows_alike`: as many tokens of one stream, and again in pieces, beside those of a second.
ROWS_ALIKE = {
    16: ((16,), (1, 2, 3, 4, 5, 1), (6, 1, 3, 4, 2)),
    3: ((3, 3), (1, 2, 1, 1, 1), (2, 1, 2, 1)),
}


def row_group(llama: LlamaLike) -> int:
    """The `ModelInfo.row_group` of a model with streams; 1 if none helps. Empties the cache."""
    for group in ROW_GROUPS:
        if np.array_equal(_last_row(llama, (), group), _last_row(llama, (2,), group)):
            return group
    return 1


def row_block(llama: LlamaLike, n_streams: int) -> int:
    """The block of streams in which a row has the same bits alone and beside another. Empties the cache."""
    streams = range(min(TRIED_ROWS, n_streams))
    for block in ROW_BLOCKS:
        alone, *beside = (*_rows(llama, streams[:1], block, n_streams), *_rows(llama, streams, block, n_streams))
        if all(np.array_equal(row, alone) for row in beside):
            return block
    return 1


def rows_alike(llama: LlamaLike, most: int) -> int:
    """The `ModelInfo.rows_alike` of a model with streams; `most` rows give logits at once. Empties the cache."""
    llama.clear()
    for stream in range(TRIED_ROWS):
        _try_prompt(llama, stream)
    for n_rows, (together, *pieces) in ROWS_ALIKE.items():
        if n_rows <= most:
            expected = np.concatenate([rows for _, rows in _in_pieces(llama, together)])
            if all(np.array_equal(rows, expected[at : at + len(rows)]) for at, rows in _in_pieces(llama, *pieces)):
                return most if n_rows == max(ROWS_ALIKE) else n_rows
    return 1


def may_take_graph(batch: Batch, last: Batch | None) -> bool:
    """True if llama.cpp may use the graph of the `last` batch, of the other kind, for this one (None: unknown).

    It does so where both have one shape: rows of drafts, and a short prompt with all its logits, in the same stream.
    """
    if last is None:
        return True
    has_several = np.any(batch.seq_ids[1:] == batch.seq_ids[:-1])
    is_other = batch.rows != last.rows and np.isin(batch.seq_ids, last.seq_ids).any()
    return bool(is_other and has_several and batch.wants_logits[0])


def fillers(seq_ids: Sequence[int], block: int, n_streams: int) -> list[int]:
    """The streams to compute beside those of a step's rows: the rest of their blocks, and small gaps between them.

    Fewer answers than SEVERAL stay fewer rows.
    """
    begins = {seq_id - seq_id % block for seq_id in seq_ids}
    whole = sorted({stream for at in begins for stream in range(at, min(at + block, n_streams))})
    ends = [place for place, (one, next_) in enumerate(pairwise(whole), 1) if next_ - one - 1 > MAX_GAP]
    together = set(whole)
    for start, end in pairwise([0, *ends, len(whole)]):
        span = range(whole[start], whole[end - 1] + 1)
        if len(span) < SEVERAL or len(set(span) & set(seq_ids)) >= SEVERAL:
            together.update(span)
    return sorted(together - set(seq_ids))


def with_company(batch: Batch, company: Mapping[int, int]) -> Batch:
    """The batch of rows in the order of streams, with those at a position of other streams, which give no logits."""
    added = np.fromiter(company, np.int32, len(company))
    nothing = np.zeros(len(company), np.int32)
    seq_ids = np.concatenate([batch.seq_ids, added])
    order = np.argsort(seq_ids, kind="stable")
    tokens = np.concatenate([batch.tokens, nothing])
    positions = np.concatenate([batch.positions, np.fromiter(company.values(), np.int32, len(company))])
    wants_logits = np.concatenate([batch.wants_logits, nothing])
    return Batch(tokens[order], positions[order], seq_ids[order], wants_logits[order], rows=batch.rows)


def _rows(llama: LlamaLike, streams: Sequence[int], block: int, n_streams: int) -> np.ndarray:
    """The logits of the same row in each of the streams, computed together in whole blocks."""
    llama.clear()
    for stream in streams:
        _try_prompt(llama, stream)
    place = np.full(len(streams), TRIED_TOKENS - 1, np.int32)
    batch = Batch(_tried(llama, place), place, np.array(streams, np.int32), np.ones(len(streams), np.int8), rows=True)
    return np.array(llama.decode(with_company(batch, dict.fromkeys(fillers(streams, block, n_streams), 0))))


def _in_pieces(llama: LlamaLike, *streams: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """The logits of each piece of the streams' rows behind their prompts, of those sizes, and its first row's number.

    The next piece of every stream is computed together.
    """
    cut = TRIED_TOKENS - 1
    for stream in range(len(streams)):
        llama.remove(stream, cut)
    ends = np.zeros(len(streams), int)
    for sizes in zip_longest(*streams, fillvalue=0):
        starts, ends = ends, ends + sizes
        places = cut + np.concatenate([np.arange(*piece) for piece in zip(starts, ends, strict=True)])
        seq_ids = np.repeat(np.arange(len(streams)), sizes)
        rows = llama.decode(Batch(_tried(llama, places), places, seq_ids, np.ones(len(places), np.int8), rows=True))
        yield from ((start, np.array(rows[seq_ids == stream])) for stream, start in enumerate(starts))


def _try_prompt(llama: LlamaLike, stream: int) -> None:
    places = np.arange(TRIED_TOKENS - 1, dtype=np.int32)
    llama.decode(Batch(_tried(llama, places), places, np.full_like(places, stream), places == len(places) - 1))


def _tried(llama: LlamaLike, places: np.ndarray) -> np.ndarray:
    return places * 7919 % llama.info.n_vocab


def _last_row(llama: LlamaLike, cuts: Sequence[int], group: int) -> np.ndarray:
    """The logits after the tokens to try, computed in pieces that end at `cuts` and are filled up to groups."""
    llama.clear()
    row = np.empty(0, np.float32)
    ends = sorted({*cuts, TRIED_TOKENS})
    for start, stop in zip((0, *ends), ends, strict=False):
        count = stop - start
        width = count if count == 1 else -(-count // group) * group
        places = np.arange(start, start + width, dtype=np.int32)
        wanted = places == stop - 1
        batch = Batch(_tried(llama, places), places, np.zeros(width, np.int32), wanted)
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
