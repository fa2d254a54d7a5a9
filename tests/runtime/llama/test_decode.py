"""What keeps the bits of a token: found out on fakes that round by the rows computed together."""

import numpy as np
import pytest

from runtime.llama.decode import MAX_GAP, fillers, row_block, row_group, rows_alike, with_company
from runtime.llama.interface import Batch
from tests.support.runtime.fakes import FakeLlama


class RowsRound(FakeLlama):
    """Rounds by the number of rows: those beyond whole groups, or beyond whole blocks of streams, in another way.

    So does it where there are `several`.
    """

    def __init__(self, *, group: int = 1, block: int = 1, several: int = 99) -> None:
        super().__init__()
        self._several = several
        self._group = group if group > 1 else block
        self._roundings: dict[int, tuple[int, ...]] = {}

    def decode(self, batch: Batch) -> np.ndarray:
        n_rows, rows = len(batch.tokens), []
        logits = iter(super().decode(batch))
        for place, (position, seq_id, wanted) in enumerate(
            zip(batch.positions.tolist(), batch.seq_ids.tolist(), batch.wants_logits, strict=True)
        ):
            kind = place >= n_rows - n_rows % self._group or n_rows >= self._several
            self._roundings[seq_id] = (*self._roundings.get(seq_id, ())[:position], kind * (position + 1))
            if wanted:
                rows.append(next(logits) + sum(self._roundings[seq_id]))
        return np.stack(rows)


@pytest.mark.parametrize("group", [1, 16])
def test_the_group_of_rows_that_keeps_the_bits(group: int) -> None:
    assert row_group(RowsRound(group=group)) == group


@pytest.mark.parametrize("block", [1, 2])
def test_the_block_of_streams_in_which_rows_keep_their_bits(block: int) -> None:
    assert row_block(RowsRound(block=block), 16) == block


@pytest.mark.parametrize(
    ("rounds", "most", "alike"), [({}, 32, 32), ({}, 8, 3), ({}, 2, 1), ({"several": 4}, 32, 3), ({"block": 2}, 32, 1)]
)
def test_the_rows_of_a_stream_that_are_computed_alike(rounds: dict[str, int], most: int, alike: int) -> None:
    assert rows_alike(RowsRound(**rounds), most) == alike


@pytest.mark.parametrize("n_streams", [1, 2])
def test_where_there_are_few_streams_few_are_tried(n_streams: int) -> None:
    assert row_block(RowsRound(), n_streams) == 1


@pytest.mark.parametrize(
    ("seq_ids", "block", "n_streams", "added"),
    [
        ([3], 1, 16, []),
        ([3], 2, 16, [2]),
        ([0, 2, 3, 5], 1, 16, [1, 4]),
        ([0, 2], 1, 16, [1]),
        ([0, 3], 1, 16, []),
        ([0, 2, 3], 1, 16, []),
        ([0, 1, 2, MAX_GAP + 3], 1, 16, list(range(3, MAX_GAP + 3))),
        ([0, 1, 2, 3, MAX_GAP + 5, 9, 10, 12], 1, 16, [11]),
        ([1, 5], 2, 16, [0, 4]),
        ([4], 2, 5, []),
    ],
)
def test_blocks_and_small_gaps_are_filled(seq_ids: list[int], block: int, n_streams: int, added: list[int]) -> None:
    assert fillers(seq_ids, block, n_streams) == added


def test_company_comes_in_the_order_of_streams_and_gives_no_logits() -> None:
    rows = Batch(
        np.array([7, 8], np.int32), np.array([30, 40], np.int32), np.array([2, 5], np.int32), np.array([1, 1], np.int8)
    )
    filled = with_company(rows, {1: 12, 3: 13, 4: 14})
    assert filled.seq_ids.tolist() == [1, 2, 3, 4, 5]
    assert filled.positions.tolist() == [12, 30, 13, 14, 40]
    assert filled.wants_logits.tolist() == [0, 1, 0, 0, 1]
    assert (filled.tokens[1], filled.tokens[4]) == (7, 8)
