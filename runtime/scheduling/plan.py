"""A plan as the arrays that `llama_decode` takes."""

from itertools import chain

import numpy as np

from runtime.requests import Batch, Chunk, Plan


def batch_of(plan: Plan) -> Batch:
    """The arrays of the plan's decode."""
    counts = [chunk.count for chunk in plan.chunks]
    tokens = [[*chunk.sequence.tokens[chunk.start : chunk.start + chunk.count], *chunk.drafts] for chunk in plan.chunks]
    ends = np.cumsum(counts)
    wants_logits = np.zeros(ends[-1], np.int8)
    for end, chunk in zip(ends, plan.chunks, strict=True):
        wants_logits[end - chunk.n_rows : end] = 1
    starts = np.repeat([chunk.start for chunk in plan.chunks] - (ends - counts), counts)
    return Batch(
        tokens=np.fromiter(chain.from_iterable(tokens), np.int32, ends[-1]),
        positions=(starts + np.arange(ends[-1])).astype(np.int32),
        seq_ids=np.repeat([seq_id_of(chunk) for chunk in plan.chunks], counts).astype(np.int32),
        wants_logits=wants_logits,
    )


def seq_id_of(chunk: Chunk) -> int:
    """The sequence id under which the chunk is computed."""
    assert chunk.sequence.seq_id is not None
    return chunk.sequence.seq_id
