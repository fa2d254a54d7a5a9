"""Scores of a written text beside the expected one. Pure.

ROUGE-L (Lin 2004): the F1 of the longest common subsequence of words, 1 for the same words in the same order. Words are
runs of letters and digits of any script, in lower case; on ASCII texts the figures are those of the package
`rouge-score` without stemming.
"""

import re

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """The words that are compared."""
    return _WORD.findall(text.lower())


def rouge_l(expected: str, given: str) -> float:
    """ROUGE-L's F1, 0 … 1. Two texts without a word have nothing to share: 0."""
    wanted, written = words_of(expected), words_of(given)
    shared = _common_length(wanted, written)
    return 2 * shared / (len(wanted) + len(written)) if shared else 0.0


def _common_length(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]
