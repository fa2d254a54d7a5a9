"""Rules, per kind of tokenizer, for cutting tokens without changing the tokens of texts that do not use them.

The guarantee: if the full vocabulary makes only kept tokens of a text, the kept tokens alone give the same ones.

SentencePiece ("llama") and byte-level BPE ("gpt2") merge neighbours, the best pair first, the leftmost of equals.
Let the full vocabulary make tokens t1 … tn of a text.
1. No merge crossed a border between two of them. So what happened within the span of ti depended on that span alone,
   and was step by step what happens to ti's own text by itself: the *path* of ti.
2. If every token on the paths of t1 … tn is kept, and every merge between kept tokens, then at each step the best pair
   is still there, and no pair is there that was not. By induction the steps are the same, and so is the end.
So a set of tokens that holds the paths of its members is closed under any cut of other tokens. A token with a
text that gets other tokens is never made by merging and needs nothing. Characters without a token end as byte tokens,
which are all kept. BPE may end with a text that is not a token (and then spell it in bytes): such paths are kept too. A
word that is taken whole without merging (`ignore_merges`) is taken whole as long as it is kept.

Unigram ("t5") takes the path of the highest sum of scores, the first found of equals. A best path of kept tokens is
among fewer rivals after the cut, with its own sum unchanged. No rival may get better: the unknown token's score depends
on the lowest score of all normal tokens, which is therefore kept; and where a one-character token is cut an unknown
token may come in, with a score below any normal one's. (A token of type "unused" with a still lower score is kept.)

Control and user-defined tokens are matched in the text before all this, the longest first. Removing one that the text
does not hold changes nothing, unless two of one length overlap, for which the sort decides: `may_overlap` finds those.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import inf
from typing import Protocol

import numpy as np

from convert.tokenizer.pieces import TokenizerKind, TokenType

from .fields import GgufVocabulary

# The lowest normal score less the score of Unigram's unknown token, as in llama.cpp.
_UNKNOWN_PENALTY = 10.0
# bytes in a character, by the upper half of its first byte
_LEAD_BYTES = (1,) * 12 + (2, 2, 3, 4)

Rank = Callable[[bytes, bytes], float]
"""Two neighbours -> the rank of their merge, lower first; infinite if they never merge."""


class Rules(Protocol):
    """The tokens that one kind of tokenizer needs for a kept token."""

    @property
    def anchors(self) -> np.ndarray:
        """Ids that must stay for any texts."""

    def path(self, token: bytes) -> Iterator[bytes]:
        """The texts on the way of merging `token`, itself last; none if merging never makes it."""


def rules_for(vocabulary: GgufVocabulary) -> Rules:
    """The rules of the vocabulary's kind."""
    if vocabulary.model == TokenizerKind.SENTENCEPIECE:
        return SentencePieceRules(vocabulary)
    return BpeRules(vocabulary) if vocabulary.model == TokenizerKind.BPE else UnigramRules(vocabulary)


class SentencePieceRules:
    """Two neighbours merge if their texts together are a token; the highest score first."""

    anchors = np.empty(0, np.int32)

    def __init__(self, vocabulary: GgufVocabulary) -> None:
        ranks = (-vocabulary.scores).tolist()
        self._ranks = dict(zip(vocabulary.tokens, ranks, strict=True))

    def path(self, token: bytes) -> Iterator[bytes]:
        """The path, characters included: unlike llama.cpp, other readers merge only characters that are tokens."""
        ranks = self._ranks
        pieces = characters(token)
        made = merge(pieces, lambda left, right: ranks.get(left + right, inf))
        return iter([*characters(token), *made] if pieces == [token] else ())


class BpeRules:
    """Two neighbours merge if the list of merges has them; the first in the list first."""

    def __init__(self, vocabulary: GgufVocabulary) -> None:
        self._ranks: dict[tuple[bytes, bytes], float] = {}
        for rank, pair in enumerate(vocabulary.merge_pairs()):
            self._ranks.setdefault(pair, rank)
        self._ids = vocabulary.ids
        nameless = {left + right for left, right in self._ranks} - self._ids.keys()
        self.anchors = np.array(sorted({self._ids[text] for one in nameless for text in self._steps(one)}), np.int32)

    def path(self, token: bytes) -> Iterator[bytes]:
        """The path, characters included: a merge is cut with either of its parts."""
        pieces = characters(token)
        made = merge(pieces, lambda left, right: self._ranks.get((left, right), inf))
        return iter([*characters(token), *made] if pieces == [token] else ())

    def _steps(self, text: bytes) -> Iterable[bytes]:
        return (step for step in self.path(text) if step in self._ids)


class UnigramRules:
    """No merges: only the tokens that the unknown token's score depends on must stay."""

    def __init__(self, vocabulary: GgufVocabulary) -> None:
        normal = np.flatnonzero(vocabulary.types == TokenType.NORMAL)
        self.anchors = np.empty(0, np.int32)
        if normal.size:
            lowest = normal[np.argmin(vocabulary.scores[normal])]
            unknown = vocabulary.scores[lowest] - np.float32(_UNKNOWN_PENALTY)
            unused = np.flatnonzero((vocabulary.types == TokenType.UNUSED) & (vocabulary.scores < unknown))
            self.anchors = np.append(unused, lowest).astype(np.int32)

    def path(self, token: bytes) -> Iterator[bytes]:
        """The token itself."""
        return iter((token,))


def characters(text: bytes) -> list[bytes]:
    """`text` split as llama.cpp does, by lead bytes, whether it is UTF-8 or not."""
    found, at = [], 0
    while at < len(text):
        end = at + _LEAD_BYTES[text[at] >> 4]
        found.append(text[at:end])
        at = end
    return found


def merge(pieces: list[bytes], rank: Rank) -> list[bytes]:
    """Merge neighbours in place, lowest rank first, leftmost of equals, until none merge; the results in order."""
    made = []
    ranks = [rank(left, right) for left, right in pairwise(pieces)]
    while ranks and (best := min(ranks)) < inf:
        at = ranks.index(best)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        made.append(pieces[at])
        del ranks[at]
        if at > 0:
            ranks[at - 1] = rank(pieces[at - 1], pieces[at])
        if at < len(ranks):
            ranks[at] = rank(pieces[at], pieces[at + 1])
    return made


def may_overlap(texts: Sequence[bytes]) -> bool:
    """True if two different texts of one length can overlap: an end of one is the beginning of another."""
    by_length: dict[int, list[bytes]] = {}
    for text in texts:
        by_length.setdefault(len(text), []).append(text)
    return any(_share_border(group, length) for length, group in by_length.items())


def _share_border(group: Sequence[bytes], length: int) -> bool:
    for size in range(1, length):
        begins: dict[bytes, set[bytes]] = {}
        for text in group:
            begins.setdefault(text[:size], set()).add(text)
        if any(begins.get(text[-size:], set()) - {text} for text in group):
            return True
    return False
