"""A candidate that lies nearer the base than the fine-tune is found out, by its distributions or by its answers."""

from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.measure.answers import judge, totals
from convert.measure.compare import MeasuredLoss
from convert.measure.forward import ModelAnswer
from convert.measure.tasks import EvalTask, Tasks
from convert.selection.choice import BaseDistances, base_distances, shared_grid, undo_cause, undo_reason
from models.gguf.header import read_header
from tests.support.convert.tiny import write_model


def test_nearer_the_base_by_distribution() -> None:
    why = undo_reason(BaseDistances(kl_to_fine_tune=1.4, kl_to_base=0.01), base_distance=1.5, noise=0.001)
    assert why == "mean KL divergence 1.4 to the fine-tune, 0.01 to its base"


def test_nearer_the_base_by_answers() -> None:
    nearness = BaseDistances(kl_to_fine_tune=0.3, kl_to_base=0.5, as_fine_tune=4, as_base=9, differing=15)
    assert undo_reason(nearness, 1.5, 0.001) == (
        "of 15 examples the two answer differently it answers 9 like the base, 4 like the fine-tune"
    )


def test_a_text_counts_for_the_side_it_is_more_like() -> None:
    """Hardly any text equals another model's to the letter, so equal ones say nothing."""
    task = Tasks("write", (EvalTask("1", (1,), (2,), "x"),), (), (), (1,), 10)

    def beside(text: str, reference: str) -> MeasuredLoss:
        examples = judge(task, [ModelAnswer(text)], [ModelAnswer(reference)])
        return MeasuredLoss(None, totals("write", examples), examples)

    tuned, base = "mail reader for Qt", "This is a program that reads mail"
    for text, like in (("mail reader in Qt", (1, 0)), ("This is one program that reads", (0, 1)), (base, (0, 1))):
        distances = base_distances(beside(text, tuned), beside(text, base))
        assert (distances.as_fine_tune, distances.as_base, distances.differing) == (*like, 1)


@pytest.mark.parametrize("distance", [0.0, 0.001])
def test_where_there_is_no_fine_tune_nothing_is_undone(distance: float) -> None:
    assert undo_reason(BaseDistances(0.4, 0.3, 1, 5, 9), distance, noise=0.001) is None


@settings(max_examples=60)
@given(st.floats(1e-6, 10), st.integers(0, 50), st.integers(0, 50))
def test_fine_tune_and_base_themselves_are_told_apart(distance: float, as_one: int, differing: int) -> None:
    """What equals the fine-tune is never refused, what equals the base always is."""
    kept = BaseDistances(0.0, distance, as_fine_tune=differing, as_base=0, differing=differing)
    lost = BaseDistances(distance, 0.0, as_fine_tune=0, as_base=differing, differing=differing)
    assert undo_reason(kept, distance, 0.0) is None
    assert undo_reason(lost, distance, 0.0) is not None


@settings(max_examples=60)
@given(st.floats(0, 10), st.floats(0, 10), st.integers(0, 20), st.integers(0, 20))
def test_swapping_base_and_fine_tune_swaps_the_verdict(one: float, other: float, n_one: int, n_other: int) -> None:
    """Not both ways round: unless distributions and answers disagree, exactly one of two different sides is nearer."""
    here = undo_reason(BaseDistances(one, other, n_one, n_other, 40), 1.0, 0.0)
    there = undo_reason(BaseDistances(other, one, n_other, n_one, 40), 1.0, 0.0)
    if one == other and n_one == n_other:
        assert here is None
        assert there is None
    elif (one - other) * (n_other - n_one) >= 0:
        assert (here is None) != (there is None)
    else:
        assert here
        assert there


def test_the_cause_is_the_shared_grid(tmp_path: Path) -> None:
    coarse = gguf.GGMLQuantizationType.Q4_0
    base = read_header(write_model(tmp_path / "base.gguf", kind=coarse))
    same = read_header(write_model(tmp_path / "same.gguf", kind=coarse))
    fine = read_header(write_model(tmp_path / "fine.gguf", kind=gguf.GGMLQuantizationType.Q8_0))
    tuned = ["blk.0.attn_q.weight", "blk.1.ffn_up.weight", "blk.0.attn_norm.weight", "no.such.tensor"]
    assert shared_grid(base, same, tuned) == {"Q4_0": 2}
    assert shared_grid(base, fine, tuned) == {}
    assert "2 of 2 fine-tuned matrices are rounded to the very grid their base lay on (Q4_0)" in undo_cause(
        {"Q4_0": 2}, 2
    )
    assert undo_cause({}, 2) == "quantizing it loses more than fine-tuning changed"


def test_a_fine_grid_is_no_cause_though_shared(tmp_path: Path) -> None:
    fine = read_header(write_model(tmp_path / "fine.gguf", kind=gguf.GGMLQuantizationType.Q8_0))
    assert shared_grid(fine, fine, ["blk.0.attn_q.weight"]) == {}
