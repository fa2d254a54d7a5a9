"""BM25: the examples that are most like a given text. Pure, and without a library: an index of a task is this small.

Okapi BM25 with the usual constants (Robertson and Zaragoza 2009) and the inverse document frequency that is never
negative. Ties are decided by the order of the texts.
"""

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

K1, B = 1.5, 0.75


def words(text: str) -> list[str]:
    """The text's words of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


class Nearest:
    """An index of `texts`."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        mean = sum(count.total() for count in counts) / len(counts)
        holders = Counter(word for count in counts for word in count)
        self._weights: dict[str, list[tuple[int, float]]] = {}
        for place, count in enumerate(counts):
            length = K1 * (1 - B + B * count.total() / mean)
            for word, n in count.items():
                idf = math.log(1 + (len(counts) - holders[word] + 0.5) / (holders[word] + 0.5))
                self._weights.setdefault(word, []).append((place, idf * n * (K1 + 1) / (n + length)))

    def find(self, text: str, n: int) -> list[int]:
        """The places of the `n` texts most like `text`, best first; fewer if fewer share a word with it."""
        return [place for place, _ in self.ranked(text, n)]

    def ranked(self, text: str, n: int) -> list[tuple[int, float]]:
        """The same with their scores."""
        scores: defaultdict[int, float] = defaultdict(float)
        for word in sorted(set(words(text))):
            for place, weight in self._weights.get(word, ()):
                scores[place] += weight
        return heapq.nsmallest(n, scores.items(), key=lambda one: (-one[1], one[0]))
