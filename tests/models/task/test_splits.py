"""Splits depend on the texts alone, keep near texts together, and give every class its part."""

import random
from collections import Counter

import pytest

from models.task.splits import groups_of, near_pairs, plain, split_by_content
from tests.support.models.tasks import CLASSES, WORDS, rows


def long_text(chance: random.Random, n: int = 60) -> list[str]:
    return [chance.choice(WORDS) for _ in range(n)]


def test_the_order_of_the_rows_does_not_matter() -> None:
    def split(pairs: list[tuple[str, str]], seed: int = 0) -> list[str]:
        return split_by_content([text for text, _ in pairs], [label for _, label in pairs], seed)[0]

    pairs = rows(200)
    first = dict(zip(pairs, split(pairs), strict=True))
    random.Random(1).shuffle(pairs)
    assert dict(zip(pairs, split(pairs), strict=True)) == first
    assert split(pairs, 1) != [first[pair] for pair in pairs], "another seed"


@pytest.mark.parametrize("n", [30, 60, 300])
def test_every_class_has_its_part_of_every_split(n: int) -> None:
    texts, labels = zip(*rows(n), strict=True)
    splits, _ = split_by_content(texts, labels, 0)
    counts = Counter(zip(labels, splits, strict=True))
    wanted = 0.15 * n / len(CLASSES)
    for label in CLASSES:
        for split in ("validation", "test"):
            assert abs(counts[label, split] - wanted) <= 1
        assert counts[label, "train"] >= counts[label, "test"]


def test_near_texts_stay_together() -> None:
    chance = random.Random(3)
    texts = []
    for _ in range(60):
        text = long_text(chance)
        edited = text.copy()
        edited[chance.randrange(60)] = "edited"
        texts += [" ".join(text), "RE: " + " ".join(edited) + "!", "  ".join(text).upper()]
    splits, near = split_by_content(texts, [""] * len(texts), 0)
    assert near == 0.5
    assert set(splits) == {"train", "validation", "test"}
    for at in range(0, len(texts), 3):
        assert len(set(splits[at : at + 3])) == 1


def test_near_pairs_are_those_of_counting_by_hand() -> None:
    chance = random.Random(4)
    texts = [long_text(chance) for _ in range(20)]
    texts += [[*text[:35], *long_text(chance, 25)] for text in texts]
    plains = [plain(" ".join(text)) for text in texts]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    expected = [
        (one, other)
        for one in range(len(plains))
        for other in range(one + 1, len(plains))
        if len(runs(plains[one]) & runs(plains[other])) > 0.5 * min(len(runs(plains[one])), len(runs(plains[other])))
    ]
    assert len(expected) == 20
    assert near_pairs(plains, 0.5) == expected


def test_a_subject_line_in_common_does_not_make_short_texts_near() -> None:
    subject = "re about the meeting on friday in the large room"
    assert (
        near_pairs([f"{subject} yes", f"{subject} I will not come since my train leaves before noon that day"], 0.5)
        == []
    )


def test_texts_of_one_template_are_still_split() -> None:
    chance = random.Random(5)
    template = long_text(chance, 50)
    texts = [" ".join([*template[:25], *long_text(chance, 8), *template[25:]]) for _ in range(100)]
    groups, near = groups_of(texts)
    assert near > 0.5
    assert len(set(groups)) > 50
