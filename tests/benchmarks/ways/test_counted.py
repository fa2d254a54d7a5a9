"""The ways without a model, on texts of which the right answer is known, and the choices made on validation."""

import random
from collections.abc import Sequence

import pytest

from benchmarks.ways import counted
from benchmarks.ways.counted import (
    VOTERS,
    RankedVoters,
    Voters,
    choose_mixture,
    choose_voters,
    commonest,
    learning_rows,
    likeliest,
    mixed,
    nearest_answer,
    word_chances,
)
from models.common.chat_records import ChatMessage, ChatRecord
from models.task.words.nearest import Nearest
from tests.support.models.tasks import CLASSES, rows

LABELS = tuple(CLASSES)


def records(pairs: Sequence[tuple[str, str]]) -> list[ChatRecord]:
    return [ChatRecord(str(n), n + 1, (ChatMessage("user", text),), answer) for n, (text, answer) in enumerate(pairs)]


def test_the_commonest_answer_is_the_first_of_several() -> None:
    assert commonest(records([("x", "b"), ("y", "a"), ("z", "a"), ("w", "b")])) == "b"
    assert commonest(records([("x", "b"), ("y", "a"), ("z", "a")])) == "a"


def test_the_word_model_learns_its_words_and_nothing_of_the_texts_in_question() -> None:
    train, test = records(rows(60)), rows(15, seed=9)
    texts = [text for text, _ in test]
    chances, strength = word_chances(train, LABELS, texts, records(rows(30, seed=5)))
    assert strength in (15, 60, 240)
    assert likeliest(chances, LABELS) == [label for _, label in test]
    assert all(sum(row) == pytest.approx(1) for row in chances)
    alone, _ = word_chances(train, LABELS, texts[:1])
    beside, _ = word_chances(train, LABELS, texts)
    assert alone[0] == pytest.approx(beside[0], abs=1e-4), "other texts change nothing"


def test_voters_are_weighed_by_similarity() -> None:
    train = records([("red car", "a"), ("red bus fast", "b"), ("blue", "b"), ("blue sky", "b")])
    voters = Voters(train, ("a", "b"))
    index = Nearest(["red car", "red bus fast", "blue", "blue sky"])
    (first, one), (second, other) = index.ranked("red car", 9)
    assert (first, second, one > other > 0) == (0, 1, True)
    chances = voters.ranked(["red car", "unknown"]).chances(2)
    assert chances[0] == pytest.approx([one / (one + other), other / (one + other)])
    assert chances[1] == [0.25, 0.75], "without a common word the labels' shares decide"
    assert voters.ranked(["red car"]).chances(1) == [[1, 0]]
    assert [one.answer for one in voters.nearest("red car", 2)] == ["a", "b"]
    assert nearest_answer(voters, "red car", train) == "a"
    assert nearest_answer(voters, "unknown", train) == "b"


def test_voters_are_chosen_on_validation() -> None:
    # The nearest is always wrong, the next three are right.
    row = [(1, 3.0), (0, 2.0), (0, 2.0), (0, 2.0)]
    ranked = RankedVoters([row] * 5, (0.5, 0.5))
    assert choose_voters(ranked, ("a", "b"), ["a"] * 5) == 4
    assert choose_voters(ranked, ("a", "b"), ["b"] * 5) == 1
    assert VOTERS[0] == 1


@pytest.mark.parametrize(("model_right", "expected"), [(True, 0.0), (False, 1.0)])
def test_the_mixture_follows_the_part_that_is_right(model_right: bool, expected: float) -> None:
    chance = random.Random(0)
    wanted = [chance.choice("ab") for _ in range(60)]
    right = [[0.9, 0.1] if label == "a" else [0.1, 0.9] for label in wanted]
    noise = [[1.0, 1e-6] if chance.random() < 0.5 else [1e-6, 1.0] for _ in wanted]
    model, vote = (right, noise) if model_right else (noise, right)
    ranked = RankedVoters([[(0, row[0]), (1, row[1])] for row in vote], (0.5, 0.5))
    share, voters = choose_mixture(model, ranked, ("a", "b"), wanted)
    found = mixed(model, ranked.chances(voters), share)
    assert likeliest(found, ("a", "b")) == wanted
    assert abs(share - expected) <= 0.5
    assert mixed(model, vote, 0.25)[0] == pytest.approx(
        [0.75 * one + 0.25 * other for one, other in zip(model[0], vote[0], strict=True)]
    )


def test_the_curve_rises_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "CURVE_SIZES", (10, 30, 800))
    train, held = records(rows(45, seed=1)), records(rows(30, seed=2))
    told: list[tuple[int, int]] = []
    curve = learning_rows(train, held[:9], held, LABELS, lambda done, total: told.append((done, total)))
    sizes = sorted({part.n_examples for part in curve})
    assert sizes == [10, 30, 45]
    assert told[-1] == (9, 9)
    words = [part for part in curve if part.way == "words"]
    assert words[-1].draws == 1
    assert words[0].low <= words[0].mean <= words[0].high
    assert words[0].mean < words[-1].mean == 1
    written = learning_rows(train, held[:9], held, (), lambda done, total: None)
    assert {part.way for part in written} == {"nearest"}
