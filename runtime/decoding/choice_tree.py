"""The exact probability of each of several choices as the model's next text, on a tree of their tokens. Pure.

    prompt ─┬─ sp ─┬─ am ───── (end) "spam"        one row of logits after each node
            │      └─ lit ──── (end) "split"       answers for all of its children
            └─ fork ─────────────────── "fork": known from the prompt's own last row

P(choice) is the product over its tokens of the model's probability for each after the prompt and the tokens before it.
Where another choice continues this one's tokens (`spam`, `spam filter`), the probability of an end is a factor too,
since only that tells the two apart. So a choice's last token is computed only where another continues it, and a choice
of a single token is known from the prompt's own last row.

Choices that begin alike share those nodes of the tree. A node's logits answer for all of its children: the prompt's own
last row is the root's, and every further node costs one token and one row of logits.

A choice's tokens so far bound it from above, since a longer text is never likelier than its beginning. A choice bounded
below `NEGLIGIBLE` of the best one is not computed. In the first wave the highest bound is taken for the best one: a
choice that passes it is needed whichever is the best. So there are two waves at most, and a second one only if the
likeliest beginning was that of a much less likely choice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from runtime.errors import EngineError
from runtime.requests import ScoringPrompt

NEGLIGIBLE = 1e-4

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens to compute after the prompt. The logits after the `first`-th (1 …) and every later one are wanted."""

    path: Path
    first: int


class ChoiceTree:
    """The choices after one prompt: compute the branches of `next_wave`, `read` their rows, until a wave is empty.

    The root's row comes first; rows that are known for another reason may be read before the first wave.
    """

    def __init__(self, prompt: ScoringPrompt) -> None:
        self.prompt = prompt
        self._ends = np.asarray(prompt.ends, np.int64)
        self._children: dict[Path, set[int]] = {}
        for choice in prompt.choices:
            for depth in range(len(choice)):
                self._children.setdefault(choice[:depth], set()).add(choice[depth])
        # The tokens of each choice that are computed: not the last one, unless another choice continues it.
        self._depths = {choice: len(choice) - (choice not in self._children) for choice in prompt.choices}
        # The log-probability of a path's last token, and of an end after the path.
        self._token: dict[Path, float] = {}
        self._end: dict[Path, float] = {}
        self._read: set[Path] = set()

    def read(self, path: Path, logits: np.ndarray) -> None:
        """Take in the logits after `path`, float32 of shape (n_vocab,). Raises EngineError if they are not finite."""
        highest = logits.max()
        if not math.isfinite(highest):
            raise EngineError(f"the model's logits are not numbers (the highest is {highest})")
        weights = logits - highest
        np.exp(weights, out=weights)
        total = float(weights.sum())  # numpy adds pairwise: float32 is exact enough, and twice as fast
        norm = float(highest) + math.log(total)
        self._read.add(path)
        for token in self._children[path]:
            self._token[(*path, token)] = float(logits[token]) - norm
        if path in self._depths:
            ended = float(weights[self._ends].sum())
            self._end[path] = math.log(ended / total) if ended else -math.inf

    def wants(self, path: Path) -> bool:
        """True if the row after `path` answers for a choice and comes next: those before it were read, it was not."""
        return path in self._children and path not in self._read and (not path or path[:-1] in self._read)

    @property
    def is_complete(self) -> bool:
        """True if no branch needs to be computed any more."""
        return not self.wants(()) and not self.next_wave()

    def next_wave(self) -> tuple[Branch, ...]:
        """The branches to compute next, once the prompt's own row was read; empty when the result is known."""
        bounds = dict(zip(self.prompt.choices, self.logprobs(), strict=True))
        is_first = len(self._read) == 1
        known = [bound for choice, bound in bounds.items() if not is_first and self._is_known(choice)]
        best = max(known or bounds.values())
        floor = best + math.log(NEGLIGIBLE)
        return self._branches(choice for choice, bound in bounds.items() if bound >= floor)

    def logprobs(self) -> tuple[float, ...]:
        """The choices' log-probabilities, in the prompt's order; an upper bound for a choice that was not computed."""
        return tuple(map(self._bound, self.prompt.choices))

    def _bound(self, choice: Path) -> float:
        bound = 0.0
        for depth in range(1, len(choice) + 1):
            step = self._token.get(choice[:depth])
            if step is None:
                return bound
            bound += step
        return bound + self._end.get(choice, 0.0)

    def _is_known(self, choice: Path) -> bool:
        return all(choice[:depth] in self._read for depth in range(1, self._depths[choice] + 1))

    def _branches(self, choices: Iterable[Path]) -> tuple[Branch, ...]:
        """Longest first, so that a choice that begins another needs no branch of its own."""
        asked = set(self._read)
        branches: list[Branch] = []
        for path in sorted({choice[: self._depths[choice]] for choice in choices}, key=lambda path: (-len(path), path)):
            nodes = [path[:depth] for depth in range(1, len(path) + 1)]
            known = sum(node in asked for node in nodes)
            if known < len(nodes):
                branches.append(Branch(path, known + 1))
                asked.update(nodes)
        return tuple(branches)
