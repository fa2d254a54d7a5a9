"""What keeps the bits of a token: found out on fakes that round by the rows computed together."""

import numpy as np
import pytest

from runtime.llama.decode import neighbour, row_group, rows_can_be_alone, with_company
from runtime.llama.interface import Batch
from tests.support.runtime.fakes import FakeLlama


class RowsRound(FakeLlama):
    """Rounds by the number of rows: K-quants in groups of 16 and the rest apart, float16 one row apart from several."""

    def __init__(self, *, group: int = 1, lone_row_differs: bool = False) -> None:
        super().__init__()
        self._group = group
        self._lone_row_differs = lone_row_differs
        self._roundings: dict[int, tuple[int, ...]] = {}

    def decode(self, batch: Batch) -> np.ndarray:
        n_rows, rows = len(batch.tokens), []
        logits = iter(super().decode(batch))
        for place, (position, seq_id, wanted) in enumerate(
            zip(batch.positions.tolist(), batch.seq_ids.tolist(), batch.wants_logits, strict=True)
        ):
            kind = place >= n_rows - n_rows % self._group or (self._lone_row_differs and n_rows == 1)
            self._roundings[seq_id] = (*self._roundings.get(seq_id, ())[:position], kind * (position + 1))
            if wanted:
                rows.append(next(logits) + sum(self._roundings[seq_id]))
        return np.stack(rows)


@pytest.mark.parametrize("group", [1, 16])
def test_the_group_of_rows_that_keeps_the_bits(group: int) -> None:
    assert row_group(RowsRound(group=group)) == group


@pytest.mark.parametrize("differs", [False, True])
def test_a_row_alone_beside_one_in_company(differs: bool) -> None:
    assert rows_can_be_alone(RowsRound(lone_row_differs=differs)) is not differs


def test_company_is_in_the_next_stream_or_the_one_before() -> None:
    assert [neighbour(seq_id, 3) for seq_id in range(3)] == [1, 2, 1]
    assert neighbour(0, 1) is None


@pytest.mark.parametrize(("company", "order"), [(4, [4, 5]), (6, [5, 6])])
def test_company_comes_in_the_order_of_streams_and_gives_no_logits(company: int, order: list[int]) -> None:
    one = Batch(np.array([7], np.int32), np.array([30], np.int32), np.array([5], np.int32), np.ones(1, np.int8))
    both = with_company(one, company, 12)
    assert both.seq_ids.tolist() == order
    mine = order.index(5)
    assert (both.tokens[mine], both.positions[mine], both.wants_logits[mine]) == (7, 30, 1)
    assert (both.positions[1 - mine], both.wants_logits[1 - mine]) == (12, 0)
