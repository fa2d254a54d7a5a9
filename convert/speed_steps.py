"""The batches that speed is measured with: prompts of one typical length, packed as serving packs them. Pure.

Which tokens they are does not matter to the time they take, so they are drawn at random.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from runtime.requests import Batch

_SEED = 7


@dataclass(frozen=True, slots=True)
class Work:
    """Examples of `prompt` tokens, after which `labels` tokens more are computed, a row of logits for each of them.

    The prompt's last token has its row too. A `cycle` is what a sequence holds when its example is done.
    """

    prompt: int
    labels: int

    @property
    def cycle(self) -> int:
        """Tokens computed for one example."""
        return self.prompt + self.labels


@dataclass(frozen=True, slots=True)
class Step:
    """A batch, and the sequences that begin a new example in it: what they held before has to go first."""

    batch: Batch
    begun: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """A step's most tokens, its most rows of logits, and how many sequences there are."""

    n_batch: int
    n_rows: int
    n_sequences: int


def packed_steps(work: Work, limits: Limits, n_vocab: int) -> Iterator[Step]:
    """Steps as large as `limits` allow, without end: one example follows the other, on the sequences in turn.

    An example may go on in the next step. A sequence never has two examples in one step.
    """
    random = np.random.default_rng(_SEED)
    done = 0
    while True:
        # no example of this step may be on the sequence of another one of it
        last = (done // work.cycle + limits.n_sequences) * work.cycle
        flat = np.arange(done, min(done + limits.n_batch, last))
        flat = flat[np.cumsum(flat % work.cycle >= work.prompt - 1) <= limits.n_rows]
        done = int(flat[-1]) + 1
        positions = flat % work.cycle
        wants_logits = positions >= work.prompt - 1
        seq_ids = flat // work.cycle % limits.n_sequences
        tokens = random.integers(0, n_vocab, len(flat))
        batch = Batch(
            tokens=tokens.astype(np.int32),
            positions=positions.astype(np.int32),
            seq_ids=seq_ids.astype(np.int32),
            wants_logits=wants_logits.astype(np.int8),
        )
        yield Step(batch, tuple(int(seq_id) for seq_id in seq_ids[positions == 0]))


def decode_step(lengths: list[int], n_vocab: int) -> Batch:
    """One token more for each of the sequences 0 … len(lengths)-1, which hold `lengths` tokens."""
    n = len(lengths)
    return Batch(
        tokens=np.random.default_rng(_SEED + lengths[0]).integers(0, n_vocab, n).astype(np.int32),
        positions=np.asarray(lengths, np.int32),
        seq_ids=np.arange(n, dtype=np.int32),
        wants_logits=np.ones(n, np.int8),
    )
