"""The ways that ask no model: the commonest answer, a word model, the nearest examples and their vote. Pure.

Each is made of the train split alone; the number of voters is chosen on the validation split.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.common.chat_records import ChatRecord
from models.common.text_scores import rouge_l
from models.task.task import text_of
from models.task.words.doubt import word_points
from models.task.words.logistic import STRENGTH, fit, probabilities
from models.task.words.nearest import Nearest

from .record import CurvePart

VOTERS = (1, 2, 4, 8, 16, 32)
SHARES = tuple(tenth / 10 for tenth in range(11))
# Inverse strengths of the word model's penalty.
STRENGTHS = (15.0, STRENGTH, 240.0)
# Time and memory of the word model grow with the square of the rows.
MAX_WORD_ROWS = 3000
CURVE_SIZES = (100, 200, 400, 800)
CURVE_DRAWS = 3

Chances = Sequence[Sequence[float]]
"""The probabilities of the labels, a row for each text."""


def commonest(train: Sequence[ChatRecord]) -> str:
    """The answer given most often; of several, the first."""
    counts = Counter(record.answer for record in train)
    return max(counts, key=counts.__getitem__)


def word_chances(
    train: Sequence[ChatRecord],
    labels: Sequence[str],
    texts: Sequence[str],
    validation: Sequence[ChatRecord] = (),
) -> tuple[Chances, float]:
    """The labels' probabilities by a word model of `train` for each of `texts`, which it learns nothing from.

    The second value is its strength, chosen by the accuracy on `validation`, if there is any.
    """
    if len(train) > MAX_WORD_ROWS:
        rows = np.random.default_rng(0).permutation(len(train))[:MAX_WORD_ROWS]
        train = [train[row] for row in sorted(rows.tolist())]
    given = np.array([labels.index(record.answer) for record in train], np.int64)
    points = word_points([*map(text_of, train), *map(text_of, validation), *texts], len(train))
    learned, held, asked = np.split(points, [len(train), len(train) + len(validation)])
    right = [labels.index(record.answer) for record in validation]
    weights = {
        strength: fit(learned, given, len(labels), strength) for strength in (STRENGTHS if right else (STRENGTH,))
    }
    best = max(
        weights,
        key=lambda one: (int((probabilities(weights[one], held).argmax(axis=1) == right).sum()), one == STRENGTH),
    )
    return probabilities(weights[best], asked).tolist(), best


class Voters:
    """The examples of `train` that vote on a text, the more alike (BM25) the more weight."""

    def __init__(self, train: Sequence[ChatRecord], labels: Sequence[str]) -> None:
        self._train = train
        self._labels = labels
        self._index = Nearest([text_of(record) for record in train])
        counts = Counter(record.answer for record in train)
        self._common = [counts[label] / len(train) for label in labels]

    def nearest(self, text: str, n: int) -> list[ChatRecord]:
        """The `n` most similar examples, the most similar first; fewer if fewer share a word."""
        return [self._train[place] for place in self._index.find(text, n)]

    def ranked(self, texts: Sequence[str]) -> "RankedVoters":
        """The voters of each text, for any number of them."""
        place = {label: number for number, label in enumerate(self._labels)}
        rows = [
            [(place[self._train[row].answer], score) for row, score in self._index.ranked(text, max(VOTERS))]
            for text in texts
        ]
        return RankedVoters(rows, self._common)


@dataclass(frozen=True, slots=True)
class RankedVoters:
    """(place of the label, weight) of the voters of each text, the most similar first.

    Where no example shares a word, the labels' shares of the train split decide.
    """

    rows: Sequence[Sequence[tuple[int, float]]]
    common: Sequence[float]

    def chances(self, voters: int) -> Chances:
        """The labels' shares of the votes."""
        return [self._share(row[:voters]) for row in self.rows]

    def _share(self, row: Sequence[tuple[int, float]]) -> Sequence[float]:
        if not row:
            return self.common
        weights = [0.0] * len(self.common)
        for place, weight in row:
            weights[place] += weight
        total = sum(weights)
        return [weight / total for weight in weights]


def likeliest(chances: Chances, labels: Sequence[str]) -> list[str]:
    """The label with the highest probability in each row; of several, the first."""
    return [labels[max(range(len(labels)), key=row.__getitem__)] for row in chances]


def n_right(chances: Chances, labels: Sequence[str], expected: Sequence[str]) -> int:
    """The rows of which the likeliest label is the expected one."""
    return sum(one == other for one, other in zip(likeliest(chances, labels), expected, strict=True))


def choose_voters(ranked: RankedVoters, labels: Sequence[str], expected: Sequence[str]) -> int:
    """The number of voters that is right most often; of several, the smallest."""
    return max(VOTERS, key=lambda voters: (n_right(ranked.chances(voters), labels, expected), -voters))


def mixed(model: Chances, vote: Chances, share: float) -> Chances:
    """(1 - share) · model + share · vote."""
    return [
        [(1 - share) * one + share * other for one, other in zip(*rows, strict=True)]
        for rows in zip(model, vote, strict=True)
    ]


def choose_mixture(
    model: Chances, ranked: RankedVoters, labels: Sequence[str], expected: Sequence[str]
) -> tuple[float, int]:
    """The vote's share and the number of voters that are right most often; of several, the smallest share."""
    return max(
        ((share, voters) for share in SHARES for voters in VOTERS),
        key=lambda one: (n_right(mixed(model, ranked.chances(one[1]), one[0]), labels, expected), -one[0], -one[1]),
    )


def learning_rows(
    train: Sequence[ChatRecord],
    validation: Sequence[ChatRecord],
    test: Sequence[ChatRecord],
    labels: Sequence[str],
    advance: Callable[[int, int], None],
) -> tuple[CurvePart, ...]:
    """Scores of the ways without a network with fewer examples: a mean over draws, each draw within the next.

    Of labels the share that is right, else the mean ROUGE-L of the nearest example's answer.
    """
    sizes = [size for size in CURVE_SIZES if size < len(train)] + [len(train)]
    draws = [np.random.default_rng(seed).permutation(len(train)).tolist() for seed in range(CURVE_DRAWS)]
    found: list[CurvePart] = []
    done, total = 0, len(sizes) * CURVE_DRAWS
    for size in sizes:
        scores: dict[str, list[float]] = {}
        for draw in draws if size < len(train) else draws[:1]:
            part = [train[row] for row in sorted(draw[:size])]
            for way, score in _scores(part, validation, test, labels).items():
                scores.setdefault(way, []).append(score)
            done += 1
            advance(done, total)
        found += [
            CurvePart(
                way=way,
                n_examples=size,
                mean=sum(values) / len(values),
                low=min(values),
                high=max(values),
                draws=len(values),
            )
            for way, values in scores.items()
        ]
    advance(total, total)
    return tuple(found)


def _scores(
    train: Sequence[ChatRecord],
    validation: Sequence[ChatRecord],
    test: Sequence[ChatRecord],
    labels: Sequence[str],
) -> Mapping[str, float]:
    voters, texts = Voters(train, labels), [text_of(one) for one in test]
    if not labels:
        found = [
            rouge_l(one.answer, nearest_answer(voters, text, train)) for one, text in zip(test, texts, strict=True)
        ]
        return {"nearest": sum(found) / len(test)}
    expected = [one.answer for one in test]
    n = choose_voters(voters.ranked([text_of(one) for one in validation]), labels, [one.answer for one in validation])
    return {
        "words": n_right(word_chances(train, labels, texts)[0], labels, expected) / len(test),
        "vote": n_right(voters.ranked(texts).chances(n), labels, expected) / len(test),
    }


def nearest_answer(voters: Voters, text: str, train: Sequence[ChatRecord]) -> str:
    """The answer of the most similar example; the commonest one where none shares a word."""
    found = voters.nearest(text, 1)
    return found[0].answer if found else commonest(train)
