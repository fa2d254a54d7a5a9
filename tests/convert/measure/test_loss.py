"""One row beside another: against the textbook in plain float64, over random logits of every temper."""

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.errors import MeasureFailed
from convert.measure.loss import STORED, RowFile, RowLoss, log_norm, row_loss, summarise

seeds = st.integers(0, 2**32 - 1)
spreads = st.sampled_from([0.01, 1.0, 4.0, 20.0])


def draw(seed: int, size: int, spread: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, spread, size).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits.astype(np.float64) - log_norm(logits))


def plain(logits: np.ndarray) -> list[float]:
    """Log-probabilities by the definition, number by number, summed exactly."""
    highest = max(map(float, logits))
    norm = math.log(math.fsum(math.exp(float(x) - highest) for x in logits))
    return [float(x) - highest - norm for x in logits]


def plain_kl(reference: list[float], candidate: list[float]) -> float:
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(reference, candidate, strict=True))


@given(seeds, spreads, st.floats(0, 3), st.integers(2, 300))
def test_a_row_is_what_the_definition_says(seed: int, spread: float, change: float, size: int) -> None:
    logits = draw(seed, size, spread)
    other = (logits + change * draw(seed + 1, size, 1.0)).astype(np.float32)
    target = seed % size
    loss = row_loss(log_softmax(logits), other, target)
    reference, candidate = plain(logits), plain(other)
    assert loss.kl == pytest.approx(plain_kl(reference, candidate), abs=1e-9, rel=1e-9)
    assert loss.agrees == (int(np.argmax(logits)) == int(np.argmax(other)))
    assert loss.reference_nll == pytest.approx(-reference[target])
    assert loss.candidate_nll == pytest.approx(-candidate[target])


@pytest.mark.parametrize("size", [1 << 14, (1 << 14) + 1, 50_000])
def test_a_row_of_many_tokens_is_what_the_definition_says(size: int) -> None:
    logits = draw(3, size, 4.0)
    other = logits + draw(4, size, 0.5)
    loss = row_loss(log_softmax(logits), other, size - 1)
    reference, candidate = plain(logits), plain(other)
    assert loss.kl == pytest.approx(plain_kl(reference, candidate), rel=1e-9)
    assert (loss.reference_nll, loss.candidate_nll) == pytest.approx((-reference[-1], -candidate[-1]))
    assert row_loss(log_softmax(logits), other, size - 1, norm=log_norm(other)) == loss


@given(seeds, spreads, st.floats(0, 2))
def test_what_lay_on_disk_as_float16_is_off_by_little(seed: int, spread: float, change: float) -> None:
    logits = draw(seed, 400, spread)
    other = (logits + change * draw(seed + 1, 400, 1.0)).astype(np.float32)
    exact = max(plain_kl(plain(logits), plain(other)), 0.0)  # rounding can bring it below
    got = row_loss(log_softmax(logits).astype(STORED), other, 0).kl
    # to first order the error is the rounding's covariance with log(p/q), whose spread is the root of 2 KL
    assert got == pytest.approx(exact, abs=2e-6 + 5e-4 * math.sqrt(2 * exact))
    assert row_loss(log_softmax(logits).astype(STORED), logits, 0).kl < 2e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = np.zeros(8, np.float32)
    stored = log_softmax(logits)
    logits[3] = bad
    with pytest.raises(MeasureFailed, match=r"not numbers|no probability"):
        row_loss(stored, logits, 0)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_the_summary_is_that_of_all_rows(divergences: list[float]) -> None:
    rows = [RowLoss(kl, place % 3 > 0, 1.0, 1.0 + kl) for place, kl in enumerate(divergences)]
    loss = summarise(rows)
    assert loss is not None
    assert loss.positions == len(rows)
    assert loss.kl_mean == pytest.approx(sum(divergences) / len(rows))
    assert loss.kl_p99 == pytest.approx(float(np.quantile(divergences, 0.99)))
    assert loss.top1_agreement == sum(place % 3 > 0 for place in range(len(rows))) / len(rows)
    assert loss.perplexity_ratio == pytest.approx(math.exp(sum(divergences) / len(rows)))


def test_no_rows_make_no_summary() -> None:
    assert summarise([]) is None


def test_rows_are_read_back_by_number(tmp_path: Path) -> None:
    rows = [draw(seed, 50, 3.0) for seed in range(4)]
    with RowFile(tmp_path / "rows", 50, create=True) as file:
        for number in (2, 0, 3, 1):
            file.write(number, rows[number])
    with RowFile(tmp_path / "rows", 50) as file:
        for number, logits in enumerate(rows):
            assert file.read(number) == pytest.approx(log_softmax(logits), rel=1e-3)
        with pytest.raises(MeasureFailed, match="ends before row 4 of 50"):
            file.read(4)


def test_what_was_measured_before_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        RowFile(tmp_path / "rows", 50, create=True)


def test_no_number_is_too_small_for_the_file(tmp_path: Path) -> None:
    logits = np.array([0, -1e30, -80_000], np.float32)
    with RowFile(tmp_path / "rows", 3, create=True) as file:
        file.write(0, logits)
    with RowFile(tmp_path / "rows", 3) as file:
        assert row_loss(file.read(0), np.array([0, -10, -20], np.float32), 0).kl == pytest.approx(0, abs=1e-4)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    n_vocab, n_rows = 20_000, 60
    logits = draw(1, n_vocab, 3.0)
    tracemalloc.start()
    try:
        with RowFile(tmp_path / "rows", n_vocab, create=True) as file:
            for number in range(n_rows):
                file.write(number, logits)
        with RowFile(tmp_path / "rows", n_vocab) as file:
            found = [row_loss(file.read(number), logits, 0) for number in range(n_rows)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == n_rows
    assert peak < 8 * n_vocab * 8  # a few float64 rows; all rows would be 60, or 15 as they lie on disk
