"""Prompt lookup: guesses the next tokens of an answer that copies its own prompt, or itself. Pure.

A rewrite, a quotation or an extraction repeats text of the prompt. Where the last tokens occurred before, the tokens
that followed them are a good guess for the next ones, and a guess costs no model: several guessed tokens are verified
in one decode. (Prompt lookup decoding, Saxena 2023; n-gram speculation.)

`Lookup` guesses, `Acceptance` learns how often guesses are right, `StepTimes` the cost of a further row, and
`draft_lengths` decides how many guessed tokens each answer gets in a step.
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
# The share of look-ups expected to be right before any was judged, and how many tries that expectation counts for.
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
        """The tokens that followed the last `LONGEST` … `SHORTEST` of `tokens` at their latest earlier occurrence.

        At most `count` tokens, and the length of the n-gram they follow; none and 0 if there is no such place.
        `tokens` are those of the last call, maybe with more behind them. A repetition is guessed to continue.
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
    """The share of looked-up tokens that were right, for each length of the n-gram. The latest count most."""

    def __init__(self, memory: int, prior: Self | None = None) -> None:
        """Remember about the last `memory` tries. Each length begins with the rate that `prior` has then."""
        self._keep = 1 - 1 / memory
        self._prior = prior
        self._counts: dict[int, tuple[float, float]] = {}

    def rate(self, n: int) -> float:
        """The probability that a token found by an n-gram of length `n` is right."""
        right, tries = self._counts.get(n) or self._begin(n)
        return right / tries

    def note(self, n: int, right: int, wrong: int) -> None:
        """Learn from a look-up by an n-gram of length `n`: `right` tokens were right, then `wrong` were not."""
        counts = self._counts.get(n) or self._begin(n)
        for hit in (1,) * right + (0,) * wrong:
            counts = counts[0] * self._keep + hit, counts[1] * self._keep + 1
        self._counts[n] = counts

    def _begin(self, n: int) -> tuple[float, float]:
        rate = FIRST_GUESS if self._prior is None else self._prior.rate(n)
        return rate * PRIOR_TRIES, PRIOR_TRIES


class Drafter:
    """One answer's look-ups: holds the `guess` for the next tokens and learns from the real ones, verified or not."""

    def __init__(self, all_answers: Acceptance) -> None:
        """`all_answers` is the acceptance of all answers, which this one begins from and adds to."""
        self._lookup = Lookup()
        self._all_answers = all_answers
        self._acceptance = Acceptance(ANSWER_MEMORY, all_answers)
        self._n = 0
        self.guess: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """The probability that the next token of the guess is right."""
        return self._acceptance.rate(self._n)

    def look_up(self, tokens: list[int], count: int) -> None:
        """Guess at most `count` tokens that follow `tokens`, which only ever grow."""
        self.guess, self._n = self._lookup.propose(tokens, count)

    def judge(self, sampled: list[int]) -> None:
        """Compare the guess with the tokens `sampled` after those of the last look-up."""
        known = min(len(sampled), len(self.guess))
        right = next((place for place in range(known) if sampled[place] != self.guess[place]), known)
        if known:
            self._acceptance.note(self._n, right, int(right < known))
            self._all_answers.note(self._n, right, int(right < known))
        self.guess = ()


# Steps of one size, the latest, that a median is taken of: a step that the machine disturbed does not matter.
RECENT_STEPS = 9
# Age in steps at which a measurement is forgotten, so that sizes that looked slow once are tried again.
FORGET_STEPS = 1000
# The guess until steps of different sizes were seen: a further row costs this part of a step with a single row.
GUESSED_SLOPE = 0.2
# The squared spread of rows that weighs as much as the guess.
GUESS_WEIGHT = 2.0
# Steps of one size that weigh as much as the line through all sizes.
LINE_WEIGHT = 3
# Drafts must promise this many times the tokens per second of the step without them: estimates err.
WORTH = 1.05
# While an answer without drafts waits for the step, the drafts of others make it at most this many times longer.
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
        """Seconds of a step with `rows` rows: the measured median, the closer to the line the fewer its steps."""
        line = self.base_s + self.row_s * rows
        seconds, n_steps = self.measured.get(rows, (line, 0))
        return (line * LINE_WEIGHT + seconds * n_steps) / (LINE_WEIGHT + n_steps)


class StepTimes:
    """Recent durations of steps that only decode, by their number of rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._seen_at: dict[int, int] = {}
        self._n_steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """Learn that a step with `rows` rows took `seconds`."""
        self._n_steps += 1
        self._seconds.setdefault(rows, deque(maxlen=RECENT_STEPS)).append(max(seconds, 1e-9))  # a coarse clock gives 0
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
    """The drafts a row of the step could have: `count`, each right with probability `rate` if those before it are."""

    rate: float
    count: int


NO_CANDIDATE = DraftCandidate(0.0, 0)


def draft_lengths(
    candidates: Sequence[DraftCandidate], spare: int, time: StepTime, *, others_wait: bool = False
) -> list[int]:
    """The number of drafts for each row of a step, at most `spare` in all, that gives the most tokens per second.

    `candidates[i]` belongs to row i of the step; NO_CANDIDATE where no draft is possible. `others_wait`: answers
    outside the step wait for it to end.
    """
    rows = len(candidates)
    bare_s = time.of(rows)
    best = lengths = [0] * rows
    tokens, best_rate = float(rows), WORTH * rows / bare_s
    gains = [candidate.rate if candidate.count else 0.0 for candidate in candidates]
    # Add the likeliest draft first: each of a candidate is less likely than the one before. Keep the best number.
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
