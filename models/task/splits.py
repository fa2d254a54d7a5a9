"""Splits by content: equal and nearly equal texts stay together, and a hash of the text decides, not the order."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

SHARES = (("test", 0.15), ("validation", 0.15))
RUN_WORDS = 5
# In shorter texts a common subject line is half of the words; they are near if they share half of the longer one's.
MIN_RUNS = 20
# A run of words that more texts share is boilerplate: it proposes neighbours, not every pair.
MAX_SHARING = 16
# Shares of common runs by which texts are near, tried in turn until no group is larger than MAX_GROUP of the rows:
# texts from one template are near each other, and one group cannot be split.
NEAR = (0.5, 0.7, 0.9, 1.0)
MAX_GROUP = 0.1

_NO_LETTERS = re.compile(r"[\W_]+")


def plain(text: str) -> str:
    """The text's letters and digits, lower case, words separated by one space: what equal texts have in common."""
    return _NO_LETTERS.sub(" ", text.casefold()).strip() or text.strip()


def groups_of(texts: Sequence[str], near: float | None = None) -> tuple[list[int], float]:
    """A group number for each text, and the share of common runs that was used; `near` None chooses it."""
    plains = [plain(text) for text in texts]
    equal = _Groups(len(texts))
    first: dict[str, int] = {}
    for row, text in enumerate(plains):
        equal.join(first.setdefault(text, row), row)
    for share in NEAR if near is None else (near,):
        groups = equal.copy()
        if share < 1:
            rows = list(first.values())
            for one, other in near_pairs([plains[row] for row in rows], share):
                groups.join(rows[one], rows[other])
        numbers = groups.numbers()
        largest = Counter(numbers).most_common(1)[0][1]
        if near is not None or share == NEAR[-1] or largest <= max(3, MAX_GROUP * len(texts)):
            return numbers, share
    raise AssertionError("the last share is always accepted")


def near_pairs(plains: Sequence[str], share: float) -> list[tuple[int, int]]:
    """Pairs of texts that share more than `share` of the shorter one's five-word runs. Texts are plain and distinct."""
    runs = [_runs(text) for text in plains]
    having: dict[int, list[int]] = defaultdict(list)
    for row, own in enumerate(runs):
        for run in own:
            having[run].append(row)
    proposed: set[tuple[int, int]] = set()
    for rows in having.values():
        if len(rows) <= MAX_SHARING:
            proposed.update(combinations(rows, 2))
        else:
            proposed.update(pair for step in (1, 2, 3) for pair in zip(rows, rows[step:], strict=False))
    return sorted(pair for pair in proposed if _near(runs[pair[0]], runs[pair[1]], share))


def split_by_content(texts: Sequence[str], strata: Sequence[str], seed: int) -> tuple[list[str], float]:
    """The split of each row, and the share that ties near texts. `strata`: classes that each split gets its part of.

    Groups are ordered by the hash of seed and text; the first 15 % of a stratum's rows are test, the next validation.
    """
    groups, near = groups_of(texts)
    rows: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows[group].append(row)
    order: dict[str, list[tuple[bytes, list[int]]]] = defaultdict(list)
    for members in rows.values():
        digest = min(
            hashlib.sha256(f"{seed}/{plain(texts[row])}".encode("utf-8", "surrogatepass")).digest() for row in members
        )
        common = Counter(strata[row] for row in members).most_common()
        order[min(name for name, n in common if n == common[0][1])].append((digest, members))
    splits = ["train"] * len(texts)
    for stratum in order.values():
        queue = [members for _, members in sorted(stratum)]
        for split, share in SHARES:
            _take(queue, splits, split, share * sum(len(members) for _, members in stratum))
    return splits, near


def _take(queue: list[list[int]], splits: list[str], split: str, wanted: float) -> None:
    """Move groups from the front of `queue` to `split` until it has `wanted` rows; at least one stays for train."""
    taken = 0
    while len(queue) > 1 and taken + len(queue[0]) / 2 <= max(wanted, 1):
        members = queue.pop(0)
        taken += len(members)
        for row in members:
            splits[row] = split


def _runs(text: str) -> frozenset[int]:
    words = text.split()
    return frozenset(hash_of(" ".join(words[at : at + RUN_WORDS])) for at in range(len(words) - RUN_WORDS + 1))


def hash_of(text: str) -> int:
    """64 bits of the text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _near(one: frozenset[int], other: frozenset[int], share: float) -> bool:
    shorter, longer = sorted((len(one), len(other)))
    return len(one & other) > share * (shorter if shorter >= MIN_RUNS else longer)


class _Groups:
    """Disjoint sets of rows."""

    def __init__(self, n_rows: int) -> None:
        self._parent = list(range(n_rows))

    def copy(self) -> "_Groups":
        copied = _Groups(0)
        copied._parent = self._parent.copy()
        return copied

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self._top(one), self._top(other)))
        self._parent[second] = first

    def numbers(self) -> list[int]:
        return [self._top(row) for row in range(len(self._parent))]

    def _top(self, row: int) -> int:
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row
