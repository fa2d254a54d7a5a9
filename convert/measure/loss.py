"""The loss of one row of logits against the reference's, and the file that stores the reference's rows.

The reference's log-probabilities are kept as float16, a row of the vocabulary at a time: half a MiB for 262k tokens.
Read back they are normalised again, so a candidate is compared with a distribution, at a KL divergence of 1e-6 or less
from the true one; the relative error of a candidate's divergence is some thousandths. Two models in memory would need
no file, but twice the memory, and the reference would be computed again for each candidate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from convert.errors import MeasureFailed
from models.quality import Loss

from .tasks import Tasks

STORED = np.dtype("<f2")
MAX_ROWS = 1024
# Below every log-probability that matters, above float16's lowest number, so that no infinity is stored.
_LOWEST = -60_000.0
_PART = 1 << 14


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """The logits after token `position` of task number `place`; the next token is `target`.

    `number` is the row's index on disk.
    """

    number: int
    place: int
    position: int
    target: int


@dataclass(frozen=True, slots=True)
class RowLoss:
    """One row: `kl` is the KL divergence from reference to candidate in nats.

    `agrees`: both have the same likeliest token. The `nll`s are negative log-probabilities of the next token, in nats.
    """

    kl: float
    agrees: bool
    reference_nll: float
    candidate_nll: float


def plan_rows(tasks: Tasks, max_rows: int = MAX_ROWS) -> tuple[LogitsRow, ...]:
    """The rows to compare, numbered in order, example by example; at least one for each, even above `max_rows`."""
    share = max(1, even_share([len(task.answer) for task in tasks.tasks], max_rows))
    rows: list[LogitsRow] = []
    for place, task in enumerate(tasks.tasks):
        last = len(task.prompt) - 1
        rows += [
            LogitsRow(len(rows) + number, place, last + step, task.answer[step])
            for number, step in enumerate(spread(len(task.answer), share))
        ]
    return tuple(rows)


def even_share(counts: Sequence[int], limit: int) -> int:
    """The largest share for which the sum of min(count, share) is at most `limit`."""
    share, left = 0, sorted(counts)
    while left and limit >= len(left) * (left[0] - share):
        limit -= len(left) * (left[0] - share)
        share = left.pop(0)
    return share + (limit // len(left) if left else 0)


def spread(count: int, share: int) -> list[int]:
    """At most `share` of 0 … count - 1, evenly spread, 0 among them."""
    if count <= 0:
        return []
    return sorted({int(step) for step in np.linspace(0, count - 1, min(count, share))})


def log_norm(logits: np.ndarray) -> float:
    """The logarithm of the sum of exp(logits), in float64. Raises MeasureFailed for NaN or infinity."""
    highest = float(logits.max())
    if not math.isfinite(highest):
        raise MeasureFailed(f"the logits are not numbers (the highest is {highest})")
    total = 0.0
    for part in _parts(len(logits)):
        weights = logits[part].astype(np.float64)
        weights -= highest
        total += float(np.exp(weights, out=weights).sum())
    return highest + math.log(total)


def row_loss(stored: np.ndarray, logits: np.ndarray, target: int, norm: float | None = None) -> RowLoss:
    """Compare `logits` with the reference's `stored` log-probabilities, both of shape (n_vocab,).

    `target` is the token that comes next, `norm` the `log_norm` of `logits`, if known. Tokens that are equally likely
    to the reference within float16 all count as its likeliest.
    """
    reference = stored.astype(np.float64)
    highest = float(reference.max())
    agrees = bool(reference[int(logits.argmax())] == highest)
    norm = log_norm(logits) if norm is None else norm
    # for rows r (reference) and c (candidate): the sums of e^r and of e^r (r - c)
    total = weighted = 0.0
    for part in _parts(len(logits)):
        gap = reference[part] - highest
        weights = np.exp(gap)
        total += float(weights.sum())
        gap -= logits[part]
        gap *= weights
        # not a dot product: a BLAS starts threads for it, which take the processor from llama.cpp's
        weighted += float(gap.sum())
    reference_norm = highest + math.log(total)
    kl = weighted / total - math.log(total) + norm
    if not math.isfinite(kl):
        raise MeasureFailed(f"the KL divergence is {kl}: a token that the reference may say has no probability")
    # below 0 only by rounding of the sum
    return RowLoss(max(0.0, kl), agrees, reference_norm - float(reference[target]), norm - float(logits[target]))


def summarise(rows: Sequence[RowLoss]) -> Loss | None:
    """The loss over `rows`; None without any. `kl_p99` is the exact quantile of their KL divergences (type 7)."""
    if not rows:
        return None
    kl = np.array([row.kl for row in rows])
    surprise = np.array([row.candidate_nll - row.reference_nll for row in rows])
    return Loss(
        positions=len(rows),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=sum(row.agrees for row in rows) / len(rows),
        perplexity_ratio=float(np.exp(min(700.0, surprise.mean()))),
    )


class RowFile:
    """Rows of `n_vocab` log-probabilities on disk, by number; opened to read, or with `create` to write."""

    def __init__(self, path: Path, n_vocab: int, *, create: bool = False) -> None:
        """Open the file. Raises OSError."""
        self._n_vocab = n_vocab
        self._row_bytes = n_vocab * STORED.itemsize
        self._file: BinaryIO = path.open("xb" if create else "rb")

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, number: int, logits: np.ndarray, norm: float | None = None) -> None:
        """Store the distribution of `logits`, shape (n_vocab,), as row `number`. `norm`: their `log_norm`, if known."""
        norm = log_norm(logits) if norm is None else norm
        self._file.seek(number * self._row_bytes)
        self._file.write(np.maximum(logits - np.float64(norm), _LOWEST).astype(STORED).tobytes())

    def read(self, number: int) -> np.ndarray:
        """Row `number`, float16 of shape (n_vocab,). Raises MeasureFailed when the file does not hold it."""
        self._file.seek(number * self._row_bytes)
        data = self._file.read(self._row_bytes)
        if len(data) != self._row_bytes:
            raise MeasureFailed(f"{self._file.name!r} ends before row {number} of {self._n_vocab} log-probabilities")
        return np.frombuffer(data, STORED)


def _parts(length: int) -> Iterator[slice]:
    """Slices of a row, so small that several fit into a core's cache: three times as fast as the row in one piece."""
    return (slice(start, start + _PART) for start in range(0, length, _PART))
