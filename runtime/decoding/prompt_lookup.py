"""Prompt lookup: what comes next if an answer copies its own prompt, or itself. Pure.

A rewrite, a quotation or an extraction says again what stands in the prompt. Where the last tokens occurred before,
what followed them then is a good guess for what follows now, and a guess costs no model: several guessed tokens are
verified in one decode. (Prompt lookup decoding, Saxena 2023; n-gram speculation.)
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
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

    def look_up(self, tokens: list[int], count: int) -> None:
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


# The latest steps with so many rows of which the median counts: one that the machine disturbed does not matter.
RECENT_STEPS = 9
# What was measured so many steps ago is forgotten, so that sizes that looked dear once are tried again.
FORGET_STEPS = 1000
# Until steps of different sizes were seen: a row more costs this part of a step with a single row ...
GUESSED_SLOPE = 0.2
# ... and this is how much spread of rows, squared, weighs as much as the guess.
GUESS_WEIGHT = 2.0
# So many steps of one size weigh as much as the line through all sizes.
LINE_WEIGHT = 3
# Drafts must promise so many times the tokens per second that the step gives without: estimates err.
WORTH = 1.05
# While somebody waits for the step and has no drafts in it, those of the others make it at most so many times longer.
MAX_DELAY = 1.25


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step that only decodes: about `base_s` and `row_s` for every row.

    `measured` are rows → the median of some steps and their number.
    """

    base_s: float
    row_s: float
    measured: Mapping[int, tuple[float, int]] = field(default_factory=dict)

    def of(self, rows: int) -> float:
        """Seconds of a step with `rows` rows: what was measured, drawn to the line by how little it was."""
        line = self.base_s + self.row_s * rows
        seconds, n_steps = self.measured.get(rows, (line, 0))
        return (line * LINE_WEIGHT + seconds * n_steps) / (LINE_WEIGHT + n_steps)


class StepTimes:
    """What steps that only decode took lately, by their rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._seen_at: dict[int, int] = {}
        self._n_steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """A step with `rows` rows took `seconds`."""
        self._n_steps += 1
        self._seconds.setdefault(rows, deque(maxlen=RECENT_STEPS)).append(max(seconds, 1e-9))  # a coarse clock says 0
        self._seen_at[rows] = self._n_steps
        for stale in [rows for rows, seen in self._seen_at.items() if self._n_steps - seen >= FORGET_STEPS]:
            del self._seconds[stale], self._seen_at[stale]

    def fit(self) -> StepTime | None:
        """The straight line through the medians (least squares, drawn to the guessed slope); None before any step."""
        if not self._seconds:
            return None
        measured = {rows: (median(times), len(times)) for rows, times in self._seconds.items()}
        weight = sum(n for _, n in measured.values())
        mean_rows = sum(n * rows for rows, (_, n) in measured.items()) / weight
        mean_s = sum(n * seconds for seconds, n in measured.values()) / weight
        guess = mean_s * GUESSED_SLOPE / (1 + GUESSED_SLOPE * (mean_rows - 1))
        rise = sum(n * (rows - mean_rows) * (seconds - mean_s) for rows, (seconds, n) in measured.items())
        spread = sum(n * (rows - mean_rows) ** 2 for rows, (_, n) in measured.items())
        row_s = (rise + GUESS_WEIGHT * guess) / (spread + GUESS_WEIGHT)
        row_s = min(max(row_s, 0.0), mean_s / mean_rows)  # neither a row nor a step without rows takes negative time
        return StepTime(mean_s - row_s * mean_rows, row_s, measured)


@dataclass(frozen=True, slots=True)
class DraftCandidate:
    """`count` drafts that a row of the step could have, each right with probability `rate` if those before it are."""

    rate: float
    count: int


NO_CANDIDATE = DraftCandidate(0.0, 0)


def draft_lengths(
    candidates: Sequence[DraftCandidate], spare: int, time: StepTime, *, others_wait: bool = False
) -> list[int]:
    """How many drafts each row of a step gets, at most `spare` in all, so that it gives the most tokens in its time.

    `candidates[i]` belongs to row i of the step; NO_CANDIDATE where no draft is possible. `others_wait` says that
    answers outside the step wait for it to end.
    """
    rows = len(candidates)
    bare_s = time.of(rows)
    best = lengths = [0] * rows
    tokens, best_rate = float(rows), WORTH * rows / bare_s
    gains = [candidate.rate if candidate.count else 0.0 for candidate in candidates]
    # The likeliest draft first; each of a candidate is less likely than the one before. Then the best number of them.
    for n_rows in range(rows + 1, rows + spare + 1):
        place = max(range(rows), key=lambda i: (gains[i], -lengths[i]))
        if gains[place] <= 0:
            break
        tokens += gains[place]
        lengths = [length + (i == place) for i, length in enumerate(lengths)]
        gains[place] *= candidates[place].rate if lengths[place] < candidates[place].count else 0.0
        step_s = time.of(n_rows)
        if tokens / step_s > best_rate and (step_s <= MAX_DELAY * bare_s or (all(lengths) and not others_wait)):
            best, best_rate = lengths, tokens / step_s
    return best
