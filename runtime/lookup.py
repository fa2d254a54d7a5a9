"""Prompt lookup: what comes next if an answer copies its own prompt, or itself. Pure.

A rewrite, a quotation or an extraction says again what stands in the prompt. Where the last tokens occurred before,
what followed them then is a good guess for what follows now, and a guess costs no model: several guessed tokens are
verified in one decode. (Prompt lookup decoding, Saxena 2023; n-gram speculation.)
"""

from typing import Self

LONGEST = 3
SHORTEST = 2
# Look-ups that an answer's acceptance remembers, and that of all answers together.
ANSWER_MEMORY = 12
ENGINE_MEMORY = 200
# What is thought of look-ups before any was judged, as the share that is right, and as how many tries that counts.
FIRST_GUESS = 0.3
PRIOR_TRIES = 2.0


class Lookup:
    """The n-grams of one answer's tokens, each with the place where it was last continued.

    It holds two entries for each token and takes constant time for each, so it is bounded by the context.
    """

    def __init__(self) -> None:
        self._continued: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(SHORTEST, LONGEST + 1)}
        self._n_read = 0

    def propose(self, tokens: list[int], count: int) -> tuple[tuple[int, ...], int]:
        """What followed the last `LONGEST` … `SHORTEST` of `tokens` where they occurred most recently before.

        At most `count` tokens, and the length of the n-gram they follow; none and 0 if there is no such place.
        `tokens` are those of the last call, maybe with more behind them. A repetition is guessed to go on.
        """
        self._read(tokens)
        for n, continued in reversed(self._continued.items()):
            start = continued.get(tuple(tokens[-n:]))
            if start is not None:
                period = len(tokens) - start
                return tuple(tokens[start + place % period] for place in range(count)), n
        return (), 0

    def _read(self, tokens: list[int]) -> None:
        """Note every n-gram that something follows."""
        for n, continued in self._continued.items():
            for end in range(max(self._n_read, n), len(tokens)):
                continued[tuple(tokens[end - n : end])] = end
        self._n_read = max(self._n_read, len(tokens))


class Acceptance:
    """How often looked-up tokens were right, for each length of the n-gram that found them. The latest count most."""

    def __init__(self, memory: int, prior: Self | None = None) -> None:
        """About the last `memory` tries are remembered. It begins as `prior` is then."""
        self._keep = 1 - 1 / memory
        self._prior = prior
        self._counts: dict[int, tuple[float, float]] = {}

    def rate(self, n: int) -> float:
        """The probability that a token found by an n-gram of length `n` is right."""
        right, tries = self._counts.get(n) or self._begin(n)
        return right / tries

    def note(self, n: int, right: int, wrong: int) -> None:
        """Tokens that an n-gram of length `n` found: `right` were right, then `wrong` were not."""
        counts = self._counts.get(n) or self._begin(n)
        for hit in (1,) * right + (0,) * wrong:
            counts = counts[0] * self._keep + hit, counts[1] * self._keep + 1
        self._counts[n] = counts

    def _begin(self, n: int) -> tuple[float, float]:
        rate = FIRST_GUESS if self._prior is None else self._prior.rate(n)
        return rate * PRIOR_TRIES, PRIOR_TRIES


class Drafter:
    """One answer's look-ups: `guess` is what may come next, and learns from what came, verified as drafts or not."""

    def __init__(self, everyone: Acceptance) -> None:
        """`everyone` is the acceptance of all answers, which this one begins from and adds to."""
        self._lookup = Lookup()
        self._everyone = everyone
        self._acceptance = Acceptance(ANSWER_MEMORY, everyone)
        self._n = 0
        self.guess: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """The probability that the next token of the guess is right."""
        return self._acceptance.rate(self._n)

    def look(self, tokens: list[int], count: int) -> None:
        """Guess at most `count` tokens that follow `tokens`, which only ever grow."""
        self.guess, self._n = self._lookup.propose(tokens, count)

    def judge(self, drawn: list[int]) -> None:
        """`drawn` came after the tokens of the last look."""
        known = min(len(drawn), len(self.guess))
        right = next((place for place in range(known) if drawn[place] != self.guess[place]), known)
        if known:
            self._acceptance.note(self._n, right, int(right < known))
            self._everyone.note(self._n, right, int(right < known))
        self.guess = ()
