"""Sampling against a plain reference, the drawn distribution by chi-square, and the generator's independence."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from runtime.decoding.sampling import SampledToken, Sampler
from runtime.errors import EngineError
from runtime.requests import SamplingParams


def row_of(n: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, n).astype(np.float32)


def drawn(row: np.ndarray, sampler: Sampler) -> SampledToken:
    return sampler.draw(row)


def reference(row: np.ndarray, params: SamplingParams) -> dict[int, float]:
    """The distribution that is drawn from, by the docstring and nothing else: sort, cut, renormalise."""
    ranked = sorted(range(len(row)), key=lambda i: (-float(row[i]), i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    weights = [math.exp((float(row[i]) - float(row[ranked[0]])) / params.temperature) for i in ranked]
    total = sum(weights)
    nucleus, reached = 0, 0.0
    while nucleus < len(ranked) and (reached < params.top_p * total or nucleus == 0):
        reached += weights[nucleus]
        nucleus += 1
    kept = {i: w for i, w in list(zip(ranked, weights, strict=True))[:nucleus] if w >= params.min_p}
    return {i: w / sum(kept.values()) for i, w in kept.items()}


def edited(row: np.ndarray, params: SamplingParams, drawn_before: list[int], allowed: np.ndarray) -> np.ndarray:
    """Step 1 of the docstring, one token at a time."""
    logits = [float(logit) for logit in row]
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    for token in range(len(row)):
        count = drawn_before.count(token)
        logits[token] -= params.frequency_penalty * count + (params.presence_penalty if count else 0)
        if not allowed[token]:
            logits[token] = -math.inf
    return np.array(logits, np.float32)


def frequencies(row: np.ndarray, params: SamplingParams, draws: int) -> Counter[int]:
    sampler = Sampler(params)
    return Counter(drawn(row, sampler).token for _ in range(draws))


def assert_follows(counts: Counter[int], expected: dict[int, float], draws: int) -> None:
    """Pearson's chi-square; classes with few expected draws are put together, as the test demands."""
    assert set(counts) <= set(expected)
    common = [i for i, p in expected.items() if p * draws >= 8]
    observed = [counts[i] for i in common] + [draws - sum(counts[i] for i in common)]
    wanted = [expected[i] * draws for i in common] + [draws - sum(expected[i] * draws for i in common)]
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 1)
    degrees = max(len(common), 1)
    assert statistic < degrees + 5 * math.sqrt(2 * degrees) + 8


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1, seed=3),
        SamplingParams(1, temperature=0.5, seed=4),
        SamplingParams(1, temperature=2.0, top_k=4, seed=5),
        SamplingParams(1, top_p=0.8, seed=6),
        SamplingParams(1, temperature=1.5, top_k=10, top_p=0.9, min_p=0.05, seed=7),
    ],
    ids=repr,
)
@pytest.mark.parametrize("n_vocab", [40, 1500])
def test_draws_follow_the_reference_distribution(params: SamplingParams, n_vocab: int) -> None:
    row = row_of(n_vocab, seed=1, spread=1.5 if n_vocab == 40 else 3)
    expected = reference(row, params)
    assert_follows(frequencies(row, params, draws=2000), expected, 2000)


@pytest.mark.parametrize("n_allowed", [30, 300])
def test_edited_and_masked_rows_are_drawn_from_as_the_reference_says(n_allowed: int) -> None:
    """Bias, penalties and a grammar's mask come first, then the cuts: a token that is taken out fills no top-k."""
    row, before = row_of(1500, seed=2, spread=1.5), [3, 3, 3, 40, 41]
    params = SamplingParams(
        1,
        temperature=0.8,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={3: 2.0, 40: 2.5, 50: 1.5, 51: -100.0},
    )
    allowed = np.zeros(1500, np.bool_)
    allowed[[3, 40, 50, 51, *np.random.default_rng(5).permutation(1500)[:n_allowed]]] = True
    expected = reference(edited(row, params, before, allowed), params)
    assert 3 < len(expected) <= 20
    counts: Counter[int] = Counter()
    for seed in range(2000):
        sampler = Sampler(replace(params, seed=seed))
        for token in before:
            sampler.note(token)
        counts[sampler.draw(row, allowed).token] += 1
    assert_follows(counts, expected, 2000)


@given(
    seed=st.integers(0, 1000),
    n_vocab=st.sampled_from([3, 260, 1100, 6000]),
    top_k=st.integers(0, 40) | st.integers(1, 6000),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 5),
)
@settings(max_examples=150)
def test_a_draw_is_always_allowed_by_the_reference(
    seed: int, n_vocab: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    row = np.round(row_of(n_vocab, seed), 1)  # rounded, so that there are ties
    params = SamplingParams(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = drawn(row, Sampler(params)).token
    allowed = reference(row, params)
    # the cuts are computed in float32 here: a token within rounding of a cut may fall on either side
    slack = reference(row, SamplingParams(1, temperature, min(top_p * 1.0001 + 1e-6, 1), top_k, min_p * 0.999))
    assert token in allowed or token in slack


@pytest.mark.parametrize("n_vocab", [5, 512, 513, 100_000])
def test_greedy_is_the_first_of_the_highest(n_vocab: int) -> None:
    row = row_of(n_vocab)
    row[[2, 4]] = 100
    assert drawn(row, Sampler(SamplingParams(1, temperature=0))).token == 2


@pytest.mark.parametrize("sign", [-1, 1])
def test_greedy_draws_with_edits_are_those_of_the_edited_row(sign: int) -> None:
    """A small vocabulary with ties, so that edits meet the likeliest token often; and often they do not."""
    rng = np.random.default_rng(7)
    moved = 0
    for _ in range(300):
        row = rng.integers(0, 4, 12).astype(np.float32)
        bias = {int(token): sign * float(rng.integers(0, 3)) for token in rng.integers(0, 12, 2)}
        penalty = -0.75 * sign
        params = SamplingParams(
            max_tokens=9, temperature=0.0, logit_bias=bias, presence_penalty=penalty, frequency_penalty=penalty / 2
        )
        before = [int(token) for token in rng.integers(0, 12, 3)]
        sampler = Sampler(params)
        for token in before:
            sampler.note(token)
        wanted = edited(row, params, before, np.ones(12, bool))
        assert sampler.draw(row).token == int(np.argmax(wanted))
        moved += int(np.argmax(wanted)) != int(np.argmax(row))
    assert 30 < moved < 270


def test_a_seed_repeats_and_another_differs() -> None:
    row = row_of(1000, spread=0.1)

    def answer(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(1, seed=seed))
        return [drawn(row, sampler).token for _ in range(20)]

    assert answer(11) == answer(11)
    assert answer(11) != answer(12)
    assert answer(-1) == answer(2**64 - 1)


def test_a_draw_depends_on_its_place_in_the_answer_only() -> None:
    """As after a pre-emption: what was drawn meanwhile by others, or when, does not matter."""
    row, params = row_of(1000, spread=0.5), SamplingParams(1, seed=9)
    alone, mixed, other = Sampler(params), Sampler(params), Sampler(SamplingParams(1, seed=10))
    expected = [drawn(row, alone) for _ in range(6)]
    found = []
    for i in range(6):
        found.append(drawn(row, mixed))
        for _ in range(i):
            drawn(row, other)
    assert found == expected


def test_bias_moves_and_bans_tokens() -> None:
    row = row_of(50)
    best = int(row.argmax())
    assert drawn(row, Sampler(SamplingParams(1, temperature=0, logit_bias={7: 100.0}))).token == 7
    assert drawn(row, Sampler(SamplingParams(1, temperature=0, logit_bias={best: -100.0}))).token != best
    assert int(row.argmax()) == best, "the row was changed"


def test_penalties_count_what_was_generated() -> None:
    row = np.zeros(10, np.float32)
    row[3], row[4], row[5] = 2.0, 1.5, 0.8
    presence = Sampler(SamplingParams(1, temperature=0, presence_penalty=1.0))
    assert [drawn(row, presence).token for _ in range(4)] == [3, 4, 3, 3]
    frequency = Sampler(SamplingParams(1, temperature=0, frequency_penalty=0.6))
    # 2.0 · 1.5 1.4 | 1.4 0.9 | .8 .9 .8 | .8 .3 .8 → of equals the lowest id
    assert [drawn(row, frequency).token for _ in range(4)] == [3, 4, 3, 4]


@pytest.mark.parametrize("temperature", [0, 1])
def test_ignore_eos_never_draws_an_end_token(temperature: float) -> None:
    row = row_of(20)
    row[[5, 6]] = 50
    sampler = Sampler(SamplingParams(1, temperature=temperature, ignore_eos=True, seed=1), end_tokens=(5, 6))
    assert not {drawn(row, sampler).token for _ in range(50)} & {5, 6}


def test_logprobs_are_the_models_own() -> None:
    row = row_of(3000)
    params = SamplingParams(1, temperature=0.3, top_k=1, logit_bias={17: 100.0}, logprobs=4)
    draw = drawn(row, Sampler(params))
    wanted = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert draw.token == 17
    assert draw.logprob == pytest.approx(wanted[17], abs=1e-5)
    order = np.argsort(-wanted)[:4]
    assert [i for i, _ in draw.top] == order.tolist()
    assert [p for _, p in draw.top] == pytest.approx(wanted[order].tolist(), abs=1e-5)
    none = drawn(row, Sampler(SamplingParams(1, logprobs=0)))
    assert none.logprob is not None
    assert none.top == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_numbers_are_refused(bad: float, temperature: float) -> None:
    row = row_of(30)
    row[9] = bad
    with pytest.raises(EngineError, match=f"not numbers .*{bad}"):
        drawn(row, Sampler(SamplingParams(1, temperature=temperature)))
