"""The part of a text that a label needs: the word model's accuracy on texts cut to different lengths.

It costs seconds where training costs minutes for each length. The time of training and serving grows with the length,
so the shortest is chosen that loses next to nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.common.stats import Interval, Paired, compare_paired, wilson

from .doubt import word_points
from .logistic import fit, probabilities

LENGTHS = (64, 128, 256, 512)
# Time and memory grow with the square of the rows.
MAX_TRAIN, MAX_VALIDATION = 1000, 600
MAX_LOSS = 0.01
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class LengthPoint:
    """Texts cut to `max_tokens` (None: whole): share of texts cut, their mean tokens, and accuracy on validation.

    `beside_whole` compares it with whole texts, example by example.
    """

    max_tokens: int | None
    share_cut: float
    mean_tokens: float
    accuracy: Interval
    beside_whole: Paired

    @property
    def told(self) -> str:
        """The point as a line of the ladder."""
        what = "whole texts" if self.max_tokens is None else f"{self.max_tokens} tokens"
        found = self.accuracy
        line = f"{what:>11}: accuracy {found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"
        compared = self.beside_whole
        if self.max_tokens is not None:
            line += f", {100 * compared.difference.estimate:+.1f} points (p {compared.p_value:.2f})"
        return f"{line}; {self.share_cut:.0%} of the texts cut, {self.mean_tokens:.0f} tokens a text"

    @property
    def loses_little(self) -> bool:
        """True if it is at most a point less accurate than whole texts, and not significantly."""
        worse = self.beside_whole.difference.estimate
        return worse >= 0 or (worse >= -MAX_LOSS and self.beside_whole.p_value >= SIGNIFICANT)


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts of one split and their labels; `drawn` takes at most `n` of them, the same ones each time."""

    texts: Sequence[str]
    labels: Sequence[str]

    def drawn(self, n: int) -> "LabelledTexts":
        """At most `n` rows, drawn by chance."""
        rows = sorted(np.random.default_rng(0).permutation(len(self.texts))[:n].tolist())
        return LabelledTexts([self.texts[row] for row in rows], [self.labels[row] for row in rows])


def length_ladder(
    train: LabelledTexts,
    validation: LabelledTexts,
    cut: Callable[[str, int], str],
    count_tokens: Callable[[str], int],
    advance: Callable[[int, int], None],
) -> tuple[LengthPoint, ...]:
    """Judge each length that cuts a text, ascending; whole texts are the last."""
    train, validation = train.drawn(MAX_TRAIN), validation.drawn(MAX_VALIDATION)
    whole = [*train.texts, *validation.texts]
    n_tokens = np.array([count_tokens(text) for text in whole])
    lengths = [length for length in LENGTHS if (n_tokens > length).any()]
    right: dict[int | None, list[bool]] = {}
    for done, length in enumerate((*lengths, None)):
        advance(done, len(lengths) + 1)
        texts = whole if length is None else [cut(text, length) for text in whole]
        right[length] = _right(texts, train.labels, validation.labels)
    return tuple(_point(length, n_tokens, right) for length in (*lengths, None))


def shortest(ladder: Sequence[LengthPoint]) -> int | None:
    """The shortest length that loses little; None for whole texts."""
    return next(point.max_tokens for point in ladder if point.loses_little)


def _point(length: int | None, n_tokens: np.ndarray, right: Mapping[int | None, list[bool]]) -> LengthPoint:
    kept = n_tokens if length is None else np.minimum(n_tokens, length)
    return LengthPoint(
        max_tokens=length,
        share_cut=float((kept < n_tokens).mean()),
        mean_tokens=float(kept.mean()),
        accuracy=wilson(sum(right[length]), len(right[length])),
        beside_whole=compare_paired(right[length], right[None]),
    )


def _right(texts: Sequence[str], trained: Sequence[str], held: Sequence[str]) -> list[bool]:
    """True for each held label that is the likeliest one; the texts of `trained` come first, then those of `held`."""
    names = sorted({*trained, *held})
    given = np.array([names.index(label) for label in (*trained, *held)], np.int64)
    points, n = word_points(texts), len(trained)
    chance = probabilities(fit(points[:n], given[:n], len(names)), points[n:])
    return [bool(one) for one in chance.argmax(axis=1) == given[n:]]
