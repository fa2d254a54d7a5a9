"""Many sequences through one model: runs of tokens are packed into decodes, branches fork off prompts they share.

This is the engine's work without its scheduler: everything to be computed is known beforehand, nobody waits, and the
packing is the same for every file, so that what differs between two files is not the batch's shape.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.llama.interface import LlamaLike
from runtime.requests import Batch


@dataclass(frozen=True, slots=True)
class Run:
    """`tokens` to compute as sequence `seq_id` from position `start` on; logits are wanted after the tokens `wanted`
    (places in `tokens`).
    """

    seq_id: int
    start: int
    tokens: Sequence[int]
    wanted: Collection[int]


@dataclass(frozen=True, slots=True)
class Branch:
    """`tokens` to compute after the whole of sequence `trunk`, which is `length` long. `read` is given each row that
    is wanted: its place in `tokens`, and its logits, valid until it returns.
    """

    trunk: int
    length: int
    tokens: Sequence[int]
    wanted: Collection[int]
    read: Callable[[int, np.ndarray], None]


def decode_runs(llama: LlamaLike, runs: Sequence[Run]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Compute all runs. Yields (run, place in its tokens, logits of shape (n_vocab,)) for each wanted row, in order.

    The logits are valid until the next step of the iterator. Raises EngineError.
    """
    flat = [
        (index, place, token, run.seq_id, run.start + place, place in run.wanted)
        for index, run in enumerate(runs)
        for place, token in enumerate(run.tokens)
    ]
    for start, end in _steps([wanted for *_, wanted in flat], llama.info.n_batch, llama.info.n_seq_max):
        part = flat[start:end]
        _, _, tokens, seq_ids, positions, wants = zip(*part, strict=True)
        logits = llama.decode(
            Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.array(positions, np.int32),
                seq_ids=np.array(seq_ids, np.int32),
                wants_logits=np.array(wants, bool),
            )
        )
        asked = ((index, place) for index, place, *_, wanted in part if wanted)
        for (index, place), row in zip(asked, logits, strict=True):
            yield index, place, row


def _steps(wants: Sequence[bool], n_batch: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """Where to cut, so that no step has more than `n_batch` tokens or `n_rows` rows."""
    start = rows = 0
    for place, wanted in enumerate(wants):
        if place - start == n_batch or rows + wanted > n_rows:
            yield start, place
            start, rows = place, 0
        rows += wanted
    if start < len(wants):
        yield start, len(wants)


def decode_branches(llama: LlamaLike, branches: Sequence[Branch], seq_ids: Sequence[int], room: int) -> None:
    """Compute `branches` as the empty sequences `seq_ids`, in at most `room` cells at a time; they end up empty again.

    Each branch must fit into `room`. Raises EngineError.
    """
    waiting = list(branches)
    while waiting:
        chosen: list[Branch] = []
        free = room
        while waiting and len(chosen) < len(seq_ids) and (not chosen or len(waiting[0].tokens) <= free):
            chosen.append(waiting.pop(0))
            free -= len(chosen[-1].tokens)
        for seq_id, branch in zip(seq_ids, chosen, strict=False):
            llama.copy_prefix(branch.trunk, seq_id, branch.length)
        runs = [
            Run(seq_id, branch.length, branch.tokens, branch.wanted)
            for seq_id, branch in zip(seq_ids, chosen, strict=False)
        ]
        for index, place, row in decode_runs(llama, runs):
            chosen[index].read(place, row)
        for seq_id in seq_ids[: len(chosen)]:
            llama.remove(seq_id)
