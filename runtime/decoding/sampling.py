"""A row of logits → a token id, with numpy over the whole vocabulary; log-probabilities on request.

The steps for a row, in this order:
1. A grammar takes out the tokens that it does not allow, `ignore_eos` the end tokens; logit bias and penalties are
   added to the raw logits. The penalties regard the generated text only: presence once, frequency for every time a
   token was sampled or forced.
2. Temperature 0 (below 1e-5): the likeliest token, of equals the lowest id. With any other:
3. top-k leaves the k likeliest; temperature divides their logits; softmax makes them probabilities.
4. min-p leaves tokens at least `min_p` times as likely as the likeliest, top-p the smallest set of the likeliest that
   reaches `top_p`. Both regard the distribution of step 3; the token is drawn from those that both leave.

A token's random number depends on the request's seed and the token's place in the answer only (Philox, counter-based).
Log-probabilities are those of the model: the log-softmax of the raw logits, before any of these steps.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from runtime.errors import EngineError
from runtime.requests import SamplingParams

GREEDY_BELOW = 1e-5
BLOCK = 512


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token; `logprob` and the likeliest `top` (token id, log-probability) on request."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Samples one answer's tokens, by its parameters, its seed and the tokens before."""

    def __init__(self, params: SamplingParams, end_tokens: Iterable[int] = ()) -> None:
        self.params = params
        self._masked = list(end_tokens) if params.ignore_eos and params.grammar is None else []
        self._put_off = list(end_tokens) if params.ignore_eos and params.grammar is not None else []
        self._bias = list(params.logit_bias), np.fromiter(params.logit_bias.values(), np.float32)
        penalties = params.presence_penalty, params.frequency_penalty
        self._penalises = any(penalties)
        self._edits_rows = bool(self._masked or params.logit_bias or self._penalises)
        # If no edit raises a logit, the likeliest token stays so unless its own logit is lowered.
        self._only_lowers = max(params.logit_bias.values(), default=0) <= 0 <= min(penalties)
        self._drawn: Counter[int] = Counter()
        self._n_drawn = 0

    def draw(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> SampledToken:
        """The next token of the answer, from one row of logits, float32 of shape (n_vocab,), which stays unchanged.

        `allowed`, bool of that shape, marks those that may come (None: all). Raises EngineError if none is finite.
        """
        row, likeliest = logits, self._unmoved(logits) if allowed is None else None
        if likeliest is None:
            row = self._edited(logits) if self._edits_rows else logits
            if allowed is not None:
                row = np.where(self._going_on(allowed), row, np.float32(-np.inf))
            likeliest = int(row.argmax())
        if not np.isfinite(row[likeliest]):
            raise EngineError(f"the model's logits are not numbers (the highest is {row[likeliest]})")
        params = self.params
        token = likeliest if params.temperature < GREEDY_BELOW else _draw(row, row[likeliest], params, self._uniform())
        self.note(token)
        if params.logprobs is None:
            return SampledToken(token)
        return with_logprobs(logits, token, params.logprobs)

    def note(self, token: int) -> None:
        """Count the answer's next token: a sampled one, or one that a grammar forced."""
        self._drawn[token] += 1
        self._n_drawn += 1

    def _going_on(self, allowed: np.ndarray) -> np.ndarray:
        """The allowed tokens; with `ignore_eos` those that end the answer only where no other may come."""
        if not self._put_off:
            return allowed
        others = allowed.copy()
        others[self._put_off] = False
        return others if others.any() else allowed

    def _unmoved(self, logits: np.ndarray) -> int | None:
        """The greedy token, where no edit can change it: copying a row would cost more than the search."""
        if not self._only_lowers or self.params.temperature >= GREEDY_BELOW:
            return None
        likeliest = int(logits.argmax())
        moved = likeliest in self._masked or likeliest in self.params.logit_bias
        return None if moved or (self._penalises and likeliest in self._drawn) else likeliest

    def _edited(self, logits: np.ndarray) -> np.ndarray:
        row = logits.copy()
        row[self._bias[0]] += self._bias[1]
        if self._penalises and self._drawn:
            counts = np.fromiter(self._drawn.values(), np.float32)
            row[list(self._drawn)] -= self.params.presence_penalty + self.params.frequency_penalty * counts
        row[self._masked] = -np.inf
        return row

    def _uniform(self) -> float:
        key = self.params.seed & (2**64 - 1)
        return float(np.random.Generator(np.random.Philox(key=key, counter=self._n_drawn)).random())


def _draw(row: np.ndarray, highest: np.float32, params: SamplingParams, uniform: float) -> int:
    ids = None
    if 0 < params.top_k < len(row):
        ids = _likeliest(row, params.top_k)
        row = row[ids]
    weights = row - highest  # one new array of the vocabulary's size, then in place: fresh memory costs most here
    if params.temperature != 1:
        weights /= np.float32(params.temperature)
    np.exp(weights, out=weights)
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= np.float32(params.min_p))
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    place = _pick(weights, uniform)
    return place if ids is None else int(ids[place])


def _likeliest(row: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest logits, highest first, of equals the lowest id; fewer if the others are -inf."""
    count = min(count, len(row))
    maxima = np.maximum.reduceat(row, np.arange(0, len(row), BLOCK))
    # At least `count` logits reach the count-th highest of the blocks' maxima: only those need sorting.
    threshold = np.partition(maxima, -count)[-count] if count <= len(maxima) else -np.inf
    reach = np.flatnonzero(row >= max(threshold, np.finfo(np.float32).min))
    ids: np.ndarray = reach[_highest(row[reach], count)]
    return ids[np.argsort(-row[ids], kind="stable")[:count]]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Places of the fewest highest weights that together reach `top_p` of the whole, highest first."""
    total = float(weights.sum(dtype=np.float64))
    # All weights below this together are less than 1 - top_p, so they cannot belong: no need to sort them.
    places = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
    count = BLOCK
    while count < len(places):  # a few of them are mostly enough
        highest = places[_highest(weights[places], count)]
        if weights[highest].sum(dtype=np.float64) >= top_p * total:
            places = highest
        count *= 8
    places = places[np.argsort(-weights[places], kind="stable")]
    reached = np.cumsum(weights[places], dtype=np.float64)
    return places[: np.searchsorted(reached, top_p * total) + 1]


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Places, in their order, of the `count` highest values and of all that equal the lowest of these."""
    if count >= len(values):
        return np.arange(len(values))
    return np.flatnonzero(values >= np.partition(values, -count)[-count])


def _pick(weights: np.ndarray, uniform: float) -> int:
    """The place at `uniform` (0 … 1) of the cumulated weights; a weight of 0 is never picked."""
    n_whole = len(weights) // BLOCK * BLOCK
    sums = weights[:n_whole].reshape(-1, BLOCK).sum(axis=1)
    blocks = np.cumsum([*sums, weights[n_whole:].sum()], dtype=np.float64)
    target = min(uniform * blocks[-1], np.nextafter(blocks[-1], 0))
    block = int(np.searchsorted(blocks, target, side="right"))
    start = block * BLOCK
    inside = np.cumsum(weights[start : start + BLOCK], dtype=np.float64)
    target = min(target - (blocks[block - 1] if block else 0), np.nextafter(inside[-1], 0))
    return start + int(np.searchsorted(inside, max(target, 0), side="right"))


def with_logprobs(logits: np.ndarray, token: int, n_top: int) -> SampledToken:
    highest = logits.max()
    np.exp(weights := logits - highest, out=weights)
    norm = float(highest) + float(np.log(weights.sum()))
    top = _likeliest(logits, n_top) if n_top else ()
    return SampledToken(token, float(logits[token]) - norm, tuple((int(i), float(logits[i]) - norm) for i in top))
