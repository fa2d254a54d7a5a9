"""The seam of constrained output: what the engine needs to know of a grammar, as protocols.

Two things: which tokens may come next, and which must. `runtime/constrain.py` stands behind it with llguidance.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .sequence import Grammar


class Constraint(Protocol):
    """One answer's place in its grammar. Not thread-safe: one thread at a time."""

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing may follow but its end."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool of shape (n_vocab,); the end tokens among them where the answer may end.

        Raises GrammarFailed when the grammar leaves no token, or runs into a limit.
        """

    def forced(self) -> list[int]:
        """The tokens that must come next, whatever the model says; often none. Does not accept them."""

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens came next. Raises GrammarFailed if the grammar does not allow them."""


class Constrainer(Protocol):
    """Grammars over one model's vocabulary. Any thread may use it."""

    def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest, with the grammar's `param`, if it cannot be used."""

    def start(self, grammar: Grammar) -> Constraint:
        """The grammar at its beginning, for one answer. Raises InvalidRequest as `check` does."""
