"""One prompt through a loaded model, without the engine: for checking a file that was just made."""

from collections.abc import Sequence

import numpy as np

from .llama_protocol import LlamaLike
from .sequence import Batch


def last_logits(llama: LlamaLike, tokens: Sequence[int]) -> np.ndarray:
    """Prefill `tokens` (1 … n_batch) as sequence 0 of an emptied cache; the last one's logits, shape (n_vocab,)."""
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
