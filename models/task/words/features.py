"""Texts as weighted words, word pairs and pieces of words, and how similar each text is to each other one.

A weight is sublinear: (1 + ln count) · (1 + ln((1 + n) / (1 + texts with it))), rows scaled to length 1, as usual.
Only similarities (the Gram matrix) are kept: n texts have at most n dimensions, however many words there are.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Tokenize = Callable[[str], Iterable[str]]

_WORD = re.compile(r"\w+")
_BLOCK = 4096


def words(text: str) -> list[str]:
    """Lower-case words of two letters or more."""
    return [word for word in _WORD.findall(text.lower()) if len(word) > 1]


def words_and_pairs(text: str) -> list[str]:
    """Words, and neighbours as one."""
    single = words(text)
    return single + [f"{first} {second}" for first, second in pairwise(single)]


def pieces(text: str) -> Iterator[str]:
    """Runs of 3 to 5 characters inside a word, with its ends marked: for endings, misspellings, unspaced scripts."""
    for word in text.lower().split():
        marked = f" {word} "
        for length in (3, 4, 5):
            yield from (marked[start : start + length] for start in range(len(marked) - length + 1))


def gram(texts: Sequence[str], tokenize: Tokenize, n_known: int | None = None) -> Floats:
    """Cosine similarities, n x n; 0 in the row of a text without a token.

    Only the first `n_known` texts weigh the tokens (None: all); those that are in none of them do not count.
    """
    counts = [Counter(tokenize(text)) for text in texts]
    spread = Counter(token for count in counts[:n_known] for token in count)
    if n_known is not None:
        counts = [Counter({token: times for token, times in count.items() if token in spread}) for count in counts]
    # A token of one text only is similar to nothing; it counts in that text's length.
    held = Counter(token for count in counts for token in count)
    place = {token: number for number, token in enumerate(token for token, n in held.items() if n > 1)}
    n = len(texts)
    known = n if n_known is None else n_known
    similar = np.zeros((n, n), np.float32)
    rows: list[int] = []
    columns: list[int] = []
    weights: list[float] = []
    for row, count in enumerate(counts):
        weighed = {
            token: (1 + math.log(times)) * (1 + math.log((1 + known) / (1 + spread[token])))
            for token, times in count.items()
        }
        length = math.sqrt(sum(weight * weight for weight in weighed.values())) or 1.0
        for token, weight in weighed.items():
            if token in place:
                rows.append(row)
                columns.append(place[token])
                weights.append(weight / length)
    order = np.argsort(np.array(columns, np.int64), kind="stable")
    row_of, column_of = np.array(rows, np.int64)[order], np.array(columns, np.int64)[order]
    weight_of = np.array(weights, np.float32)[order]
    for first in range(0, len(place), _BLOCK):
        part = slice(*np.searchsorted(column_of, (first, first + _BLOCK)))
        dense = np.zeros((n, _BLOCK), np.float32)
        dense[row_of[part], column_of[part] - first] = weight_of[part]
        similar += dense @ dense.T
    np.fill_diagonal(similar, [1.0 if count else 0.0 for count in counts])
    return similar.astype(np.float64)


def coordinates(similar: Floats) -> Floats:
    """Points with these inner products, one row each. A linear model with an L2 penalty is the same on them."""
    values, vectors = np.linalg.eigh(similar)
    kept = values > values[-1] * 1e-7
    return np.ascontiguousarray(vectors[:, kept] * np.sqrt(values[kept]), np.float32)
