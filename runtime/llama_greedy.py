"""The greedy answer to one prompt, without the engine: for comparing two files that were just made."""

from collections.abc import Sequence

import numpy as np

from .llama_protocol import LlamaLike
from .sequence import Batch


def greedy_answer(llama: LlamaLike, prompt: Sequence[int], limit: int) -> list[int]:
    """The likeliest next token, up to `limit` times or the end of the answer, as sequence 0 of an emptied cache."""
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
