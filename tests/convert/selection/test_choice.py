"""The pick is the fastest within the budget, whatever the figures; `--quant` overrules it and says so."""

import re
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import RequestInvalid
from convert.selection.choice import TIE, choose
from models.quality import Answers, Candidate, Loss, LossBudget, MeanScore, Speed

BUDGET = LossBudget()


def loss(kl_mean: float) -> Loss:
    return Loss(positions=10, kl_mean=kl_mean, kl_p99=kl_mean, top1_agreement=1.0, perplexity_ratio=1.0)


def answers(correct: int = 80, flips: int = 0, p_value: float = 1.0) -> Answers:
    return Answers(total=100, correct=correct, flips=flips, difference_low=-1, difference_high=1, p_value=p_value)


def written(mean: float, low: float, high: float) -> Answers:
    """Answers of which nearly all differ from F16's in text, with a mean ROUGE-L beside F16's 0.5."""
    score = MeanScore(metric="ROUGE-L", mean=mean, reference_mean=0.5, difference_low=low, difference_high=high)
    return answers(correct=0, flips=97, p_value=1e-9).model_copy(update={"score": score})


def made(name: str, score: float | None = 1.0, size: int = 100, kl: float = 0.0, **parts: Any) -> Candidate:
    parts = {"answers": answers(), "loss": loss(kl), **parts}
    return Candidate(name=name, file=f"{name}.gguf", size_bytes=size, sha256="a", score_per_s=score, **parts)


def timed(name: str, rounds: tuple[float, ...], size: int) -> Candidate:
    speed = Speed(prefill_tokens_per_s=1, decode_tokens_per_s={1: 1}, peak_memory_bytes=1, score_samples_per_s=rounds)
    return made(name, statistics.median(rounds), size, speed=speed)


F16 = made("F16", 1.0, 1000)


def test_the_fastest_within_the_budget_is_chosen() -> None:
    choice = choose([F16, made("Q8_0", 2.0), made("Q4_0", 3.0, kl=0.019), made("Q4_K_M", 9.0, kl=0.021)], BUDGET)
    assert choice.chosen == "Q4_0"
    assert [one.verdict for one in choice.candidates] == ["within budget", "within budget", "chosen", "over budget"]
    assert "0.021, the budget is 0.02" in choice.candidates[3].reason
    assert not choice.overruled


def test_a_tie_goes_to_the_smaller_file() -> None:
    choice = choose([F16, made("big", 2.0, 200), made("small", 2.0 * (1 - TIE / 2), 150)], BUDGET)
    assert choice.chosen == "small"
    assert choice.reason.startswith("the smallest of the fastest within the budget: 1.97 examples/s")
    assert choice.reason.endswith("from big's 2")
    assert choose([F16, made("big", 2.0, 200)], BUDGET).reason == "the fastest within the budget: 2 examples/s"


@pytest.mark.parametrize(
    ("rounds", "chosen"),
    [
        pytest.param((1.85, 1.95, 1.85), "small", id="the ranges overlap"),
        pytest.param((1.85, 1.85, 1.85), "big", id="the slower in every round"),
        pytest.param((1.4, 1.95, 1.4), "small", id="far apart, but the ranges overlap"),
    ],
)
def test_overlapping_ranges_tie(rounds: tuple[float, ...], chosen: str) -> None:
    small, big = timed("small", rounds, 150), timed("big", (2.0, 1.9, 2.0), 200)
    assert choose([F16, small, big], BUDGET).chosen == chosen
    assert choose([F16, big, small], BUDGET).chosen == chosen


def test_a_larger_file_is_chosen_with_what_it_gains() -> None:
    large, small = timed("F16", (2.8, 2.7, 2.9), 212 << 20), timed("Q8_0", (2.0, 1.9, 2.1), 113 << 20)
    choice = choose([large, small], BUDGET)
    assert choice.reason == (
        "the fastest within the budget: 2.8 (2.7 to 2.9) examples/s, 1.40 times Q8_0's 2 (1.9 to 2.1) "
        "(size: 212 MiB to 113 MiB)"
    )


def test_without_speeds_the_smallest_is_chosen() -> None:
    candidates = [F16.model_copy(update={"score_per_s": None}), made("Q8_0", None, 300), made("Q4_0", None, 200)]
    choice = choose(candidates, BUDGET)
    assert choice.chosen == "Q4_0"
    assert "speed was not measured" in choice.reason


@pytest.mark.parametrize(
    ("worse", "why"),
    [
        ({"loss": loss(0.03)}, "mean KL divergence 0.03"),
        ({"loss": loss(float("nan"))}, "mean KL divergence nan"),
        ({"loss": None}, "not measured"),
        ({"answers": answers(flips=3)}, r"3 of 100 answers changed \(3.0%\), the budget is 2.0%"),
        ({"answers": answers(correct=60, p_value=0.04)}, "60 of 100 answers are right, 80 were"),
    ],
)
def test_each_part_of_the_budget_can_refuse(worse: dict[str, Any], why: str) -> None:
    choice = choose([F16, made("Q4_0", 9.0, **worse)], BUDGET)
    assert choice.chosen == "F16"
    assert "half-precision file stays" in choice.reason
    assert choice.candidates[1].verdict == "over budget"
    assert re.search(why, choice.candidates[1].reason)


def test_a_shared_grid_is_named_where_something_was_lost_and_only_there() -> None:
    lost, kept = made("Q4_K_M", kl=0.4, grid="3 of 3 matrices are rounded"), made("Q5_K_M", kl=0.01, grid="3 of 3")
    _, refused, allowed = choose([F16, lost, kept], BUDGET).candidates
    assert refused.reason.endswith("the budget is 0.02. 3 of 3 matrices are rounded")
    assert "3 of 3" not in allowed.reason


def test_better_accuracy_or_a_loss_of_it_by_chance_is_no_ground() -> None:
    better, chance = answers(correct=95, flips=2, p_value=0.001), answers(correct=79, flips=2, p_value=0.9)
    choice = choose([F16, made("a", answers=better), made("b", answers=chance)], BUDGET)
    assert "over budget" not in [one.verdict for one in choice.candidates]


def test_changed_texts_refuse_nothing_and_a_lower_score_does() -> None:
    reference = made("F16", 1.0, 1000, answers=written(0.5, 0, 0))
    as_good, by_chance = made("a", 2.0, answers=written(0.5, -0.02, 0.02)), made("b", answers=written(0.4, -0.2, 0.001))
    worse, better = made("c", 9.0, answers=written(0.4, -0.15, -0.05)), made("d", answers=written(0.6, 0.05, 0.15))
    choice = choose([reference, as_good, by_chance, worse, better], BUDGET)
    assert choice.chosen == "a"
    assert [one.verdict for one in choice.candidates if one.verdict == "over budget"] == ["over budget"]
    assert choice.candidates[3].reason == (
        "mean ROUGE-L 0.400, F16's is 0.500 (difference -0.100, 95 % interval -0.150 to -0.050)"
    )
    lossy = made("e", answers=written(0.5, -0.02, 0.02), kl=0.03)
    assert choose([reference, lossy], BUDGET).candidates[1].reason == "mean KL divergence 0.03, the budget is 0.02"


@pytest.mark.parametrize(("itself", "chosen"), [(0.499, "F16"), (0.489, "Q8_0"), (0.511, "Q8_0")])
def test_a_difference_that_the_reference_shows_to_itself_is_not_real(itself: float, chosen: str) -> None:
    reference = made("F16", 1.0, 1000, answers=written(0.5, 0, 0))
    shifted = made("Q8_0", 2.0, answers=written(0.49, -0.015, -0.005))
    assert choose([reference, shifted], BUDGET, noise=written(itself, 0, 0).score).chosen == chosen
    assert choose([reference, shifted], BUDGET).chosen == "F16"


def test_max_loss_moves_the_line() -> None:
    candidates = [F16, made("Q4_0", 9.0, kl=0.05)]
    assert choose(candidates, BUDGET).chosen == "F16"
    assert choose(candidates, LossBudget(kl_mean=0.1)).chosen == "Q4_0"


def test_a_forced_name_overrules_the_budget_and_the_reason_says_so() -> None:
    undo_reason = made("Q4_K_M", 2.0, verdict="undoes the fine-tune", reason="nearer the base")
    for wanted, against in (
        (undo_reason, "although it undoes the fine-tune: nearer the base"),
        (made("Q4_0", 2.0, kl=0.5), "although it is over budget: mean KL divergence 0.5"),
        (made("Q8_0", 0.5), "asked for by name"),
    ):
        choice = choose([F16, wanted], BUDGET, wanted.name)
        assert (choice.chosen, choice.overruled) == (wanted.name, True)
        assert against in choice.reason


def test_a_failed_or_unknown_candidate_cannot_be_forced() -> None:
    candidates = [F16, made("Q4_0", verdict="failed", reason="aborted")]
    with pytest.raises(RequestInvalid, match="'Q4_0' was asked for, but it failed: aborted"):
        choose(candidates, BUDGET, "Q4_0")
    with pytest.raises(RequestInvalid, match="no candidate 'Q2_K' was made; there are F16, Q4_0"):
        choose(candidates, BUDGET, "Q2_K")


CANDIDATES = st.lists(
    st.builds(
        lambda score, size, kl, flips, verdict: (score, size, kl, flips, verdict),
        st.floats(0.1, 100),
        st.integers(1, 1000),
        st.floats(0, 0.05),
        st.integers(0, 5),
        st.sampled_from(["unjudged", "failed", "undoes the fine-tune"]),
    ),
    max_size=8,
)


@settings(max_examples=60)
@given(CANDIDATES)
def test_nothing_within_the_budget_is_clearly_faster_than_the_pick(figures: list[Any]) -> None:
    others = [
        made(f"c{place}", score, size, kl, answers=answers(flips=flips), verdict=verdict, reason="because")
        for place, (score, size, kl, flips, verdict) in enumerate(figures)
    ]
    choice = choose([F16, *others], BUDGET)
    picked = next(one for one in choice.candidates if one.name == choice.chosen)
    assert [one.verdict for one in choice.candidates].count("chosen") == 1
    assert picked.loss is not None
    assert picked.loss.kl_mean <= BUDGET.kl_mean
    assert picked.answers is not None
    assert picked.answers.flips <= 2
    allowed = [one for one in choice.candidates if one.verdict in {"within budget", "chosen"}]
    best = max(one.score_per_s or 0 for one in allowed)
    assert (picked.score_per_s or 0) >= best * (1 - TIE)
    for before, after in zip([F16, *others], choice.candidates, strict=True):
        if before.verdict != "unjudged":
            assert after == before
        assert after.reason


@settings(max_examples=60)
@given(CANDIDATES, st.randoms())
def test_the_order_of_the_candidates_does_not_matter(figures: list[Any], chance: Any) -> None:
    others = [made(f"c{place}", *rest[:3], verdict=rest[4]) for place, rest in enumerate(figures)]
    mixed = [F16, *others]
    chance.shuffle(mixed)
    assert choose(mixed, BUDGET).chosen == choose([F16, *others], BUDGET).chosen
