"""How likely each choice is to be what the model says next: exact, on a tree of the choices' tokens. Pure.

P(choice) is the product over its tokens, and over what ends it, of the model's probability for each after the prompt
and the tokens before it. Choices that begin alike share those nodes of the tree. A node's logits answer for all of its
children, so the prompt's own last row is the root's, and every further node costs one token.

What is known of a choice so far bounds it from above, since a longer text is never likelier than its beginning. A
choice that is bounded below `NEGLIGIBLE` of the best one is not computed. While no choice is whole, the highest bound
stands for the best one: whatever it lets pass would be needed for every possible best. So there are two waves at most,
and a second one only if the best choice turns out much less likely than its beginning.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .errors import EngineError
from .sequence import Question

NEGLIGIBLE = 1e-4

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens to compute after the prompt. The logits after the `first`-th (1 …) and every later one are wanted."""

    path: Path
    first: int


class Ballot:
    """One question: take `next_wave`, compute its branches, `read` their rows, until there is no further wave."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._ends = np.asarray(question.ends, np.int64)
        self._choices = frozenset(question.choices)
        self._children: dict[Path, set[int]] = {}
        for choice in question.choices:
            for depth in range(len(choice)):
                self._children.setdefault(choice[:depth], set()).add(choice[depth])
        # The log-probability of a path's last token, and of an end after the path.
        self._token: dict[Path, float] = {}
        self._end: dict[Path, float] = {}

    def read(self, path: Path, logits: np.ndarray) -> None:
        """Take in the logits after `path`, float32 of shape (n_vocab,). Raises EngineError if they are not numbers."""
        highest = logits.max()
        if not math.isfinite(highest):
            raise EngineError(f"the model's logits are not numbers (the highest is {highest})")
        weights = logits - highest
        np.exp(weights, out=weights)
        total = float(weights.sum(dtype=np.float64))
        norm = float(highest) + math.log(total)
        for token in self._children.get(path, ()):
            self._token[(*path, token)] = float(logits[token]) - norm
        if path in self._choices:
            ended = float(weights[self._ends].sum(dtype=np.float64))
            self._end[path] = math.log(ended / total) if ended else -math.inf

    def next_wave(self) -> tuple[Branch, ...]:
        """What to compute next, after the prompt's own row has been read; empty when the answer is known."""
        bounds = {choice: self._bound(choice) for choice in self._choices}
        settled = [bound for choice, bound in bounds.items() if choice in self._end]
        floor = max(settled or bounds.values()) + math.log(NEGLIGIBLE)
        return self._branches(choice for choice in self._choices if choice not in self._end and bounds[choice] >= floor)

    def logprobs(self) -> tuple[float, ...]:
        """The choices' log-probabilities, in the question's order; an upper bound for what was not computed."""
        return tuple(map(self._bound, self.question.choices))

    def _bound(self, choice: Path) -> float:
        bound = 0.0
        for depth in range(1, len(choice) + 1):
            step = self._token.get(choice[:depth])
            if step is None:
                return bound
            bound += step
        return bound + self._end.get(choice, 0.0)

    def _branches(self, choices: Iterable[Path]) -> tuple[Branch, ...]:
        """Longest first, so that a choice that begins another needs no branch of its own."""
        asked: set[Path] = set()
        branches: list[Branch] = []
        for choice in sorted(choices, key=lambda path: (-len(path), path)):
            nodes = [choice[:depth] for depth in range(1, len(choice) + 1)]
            known = sum(node in asked or self._is_read(node) for node in nodes)
            if known < len(nodes):
                branches.append(Branch(choice, known + 1))
                asked.update(nodes)
        return tuple(branches)

    def _is_read(self, node: Path) -> bool:
        if node in self._choices:
            return node in self._end
        return all((*node, token) in self._token for token in self._children[node])
