"""The estimate adds up, and --minutes chooses the most that fits."""

import random
import re

import numpy as np
import pytest

from convert.errors import FinetuneFailed
from convert.training.base import DecoderShape
from convert.training.examples import TokenRow, batches_of
from convert.training.settings import FinetuneSettings

pytest.importorskip("jax", reason="needs the extra `finetune`")
from convert.training.cost import MeasuredCosts, TrainingWork, choose, padded_tokens

pytestmark = pytest.mark.finetune
COSTS = MeasuredCosts(frozen=1e-4, trained=3e-4, last=2e-4, compilation=5.0)


class Steps:
    """The part of `DecoderSteps` that the choice reads, for a base of 18 layers."""

    shape = DecoderShape("llama", 64, 4, 2, 16, 96, 1e-5, (False,) * 18, 0, False, 0.25, 1.0, 0.0, 0.0)
    n_vocab = 1000

    def __init__(self, **settings: object) -> None:
        self.settings = FinetuneSettings.model_validate(settings)


@pytest.fixture(scope="module")
def work() -> TrainingWork:
    chance = random.Random(1)
    sizes = [chance.randint(40, 200) for _ in range(400)]
    rows = [TokenRow(np.zeros(size, np.int32), np.zeros(3, np.int32)) for size in sizes]
    return TrainingWork(rows, batches_of(rows, 8, None), rows[:50], batches_of(rows[:50], 8, None), None)


def test_the_lower_layers_are_paid_for_once(work: TrainingWork) -> None:
    tokens, checked = padded_tokens(work.batches), padded_tokens(work.check_batches)
    one, two = (COSTS.seconds(work, 18, 6, epochs) for epochs in (1, 2))
    epoch = tokens * (5 * 3e-4 + 2e-4) + checked * 6e-4
    assert two - one == pytest.approx(epoch)
    assert one - epoch == pytest.approx(12e-4 * (tokens + checked) + 5.0 * work.n_shapes)


def test_without_a_limit_the_upper_half_is_trained(work: TrainingWork) -> None:
    cost = choose(COSTS, work, Steps())  # type: ignore[arg-type]
    assert (cost.layers, cost.epochs) == (9, 3)


@pytest.mark.parametrize(("n_copies", "epochs"), [(1, 3), (2, 2)])
def test_many_examples_need_fewer_passes(work: TrainingWork, n_copies: int, epochs: int) -> None:
    """400 examples are 50 steps, 800 are 100."""
    rows = [*work.rows] * n_copies
    many = TrainingWork(rows, batches_of(rows, 8, None), work.checked, work.check_batches, None)
    assert choose(COSTS, many, Steps()).epochs == epochs  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_minutes_choose_the_most_that_fits(work: TrainingWork, share: float) -> None:
    whole = choose(COSTS, work, Steps(minutes=1e6))  # type: ignore[arg-type]
    assert (whole.layers, whole.epochs) == (18, 4)
    minutes = whole.seconds * share / 60
    cost = choose(COSTS, work, Steps(minutes=minutes))  # type: ignore[arg-type]
    assert cost.seconds <= minutes * 60
    assert (cost.layers, cost.epochs) != (whole.layers, whole.epochs)
    assert cost.epochs == 4 or COSTS.seconds(work, 18, cost.layers, cost.epochs + 1) > minutes * 60


def test_layers_and_epochs_that_were_asked_for_stay(work: TrainingWork) -> None:
    cost = choose(COSTS, work, Steps(layers=17, epochs=9))  # type: ignore[arg-type]
    assert (cost.layers, cost.epochs) == (17, 9)


def test_what_is_named_in_a_refusal_fits(work: TrainingWork) -> None:
    minutes = COSTS.seconds(work, 18, 1, 1) * 1.1 / 60
    with pytest.raises(FinetuneFailed) as refused:
        choose(COSTS, work, Steps(layers=17, epochs=9, minutes=minutes))  # type: ignore[arg-type]
    found = re.search(r"--minutes (\d+) or --layers 1 --epochs 1", str(refused.value))
    assert found is not None
    choose(COSTS, work, Steps(layers=17, epochs=9, minutes=float(found[1])))  # type: ignore[arg-type]
    choose(COSTS, work, Steps(layers=1, epochs=1, minutes=minutes))  # type: ignore[arg-type]
