"""One `llama_decode`: the memory of its batch, the errors of its codes, and two decodes that need no engine."""

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
