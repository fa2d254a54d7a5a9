"""One answer's grammar while the engine writes it: what may be drawn, and what need not be drawn.

Tokens that the grammar forces are appended to the answer at once; the scheduler then computes them as a chunk of
prefill instead of one step each. With log-probabilities asked for, every token needs the logits before it: then a
forced token is drawn in its own step, as the only one allowed, so that the answer is the same.
"""

from collections.abc import Callable

import numpy as np

from .constrain_protocol import Constrainer, Constraint
from .detokenize import TextStream
from .sequence import Grammar, SamplingParams


class Guide:
    """A constraint, and whether its forced tokens are taken `one_by_one`."""

    def __init__(self, constraint: Constraint, *, one_by_one: bool) -> None:
        self._constraint = constraint
        self._one_by_one = one_by_one

    @property
    def complete(self) -> bool:
        """Whether the answer is whole."""
        return self._constraint.complete

    def allowed(self) -> np.ndarray:
        """Which tokens may be drawn next, bool of shape (n_vocab,). Raises GrammarFailed."""
        allowed = self._constraint.allowed()
        if self._one_by_one and (forced := self._constraint.forced()):
            allowed[:] = False
            allowed[forced[0]] = True
        return allowed

    def take(self, token: int, room: int) -> list[int]:
        """`token` was drawn; the tokens, at most `room`, that the grammar makes follow. Raises GrammarFailed."""
        self._constraint.accept([token])
        return [] if self._one_by_one or self.complete else self.force(room)

    def force(self, room: int) -> list[int]:
        """The tokens, at most `room`, that come next whatever the model says; they count as taken."""
        forced = self._constraint.forced()[:room]
        if forced:
            self._constraint.accept(forced)
        return forced


def begin(
    constrainer: Constrainer, grammar: Grammar, params: SamplingParams, token_bytes: Callable[[int], bytes]
) -> tuple[Guide, list[int]]:
    """A new answer's guide, and the tokens that are forced before anything is drawn.

    They never end the answer: at least one token is left to draw. Raises InvalidRequest or GrammarFailed.
    """
    if params.logprobs is not None:
        return Guide(constrainer.start(grammar), one_by_one=True), []
    room = _room_before_end(constrainer.start(grammar), params, token_bytes)
    guide = Guide(constrainer.start(grammar), one_by_one=False)
    return guide, guide.force(room)


def _room_before_end(constraint: Constraint, params: SamplingParams, token_bytes: Callable[[int], bytes]) -> int:
    """How many forced tokens come before one that would end the answer: by length, stop string or grammar."""
    text = TextStream(token_bytes, params.stop)
    forced = constraint.forced()[: params.max_tokens - 1]
    for place, token in enumerate(forced):
        text.push(token)
        constraint.accept([token])
        if text.stopped or constraint.complete:
            return place
    return len(forced)
