"""The card's table and picture from made-up predictions."""

import tomllib
from pathlib import Path

import pytest

from benchmarks.comparison.evaluate import Evaluation, Prediction, score_evaluation
from benchmarks.report.card_figures import NAMES, majority, markdown, quality, with_part
from benchmarks.report.plots import confusion_picture, latency_picture
from models.manifest import Accuracy
from tests.support.benchmarks.examples import arm, run_of, sample

LABELS = ("fork", "ilug", "spam")


def made(right: int) -> Evaluation:
    """Sixty mails of three labels, the first `right` of them answered rightly, the rest with no label."""
    items = [(str(i), LABELS[i % 3]) for i in range(60)]
    predictions = [
        Prediction(id=item, label=label, prediction=label if i < right else "well")
        for i, (item, label) in enumerate(items)
    ]
    return Evaluation(labels=LABELS, predictions=tuple(predictions))


def test_the_table_has_every_row_and_the_paired_difference() -> None:
    found = {name: made(right) for name, right in zip(NAMES, (20, 53, 0, 5, 10, 15, 55, 56, 54), strict=True)}
    text = "\n".join(markdown(found))
    for name in NAMES.values():
        assert name in text
    assert "| fine-tune as served | 0.900 [0.799, 0.953] | 54 of 60 |" in text
    few_shot = "base, few-shot prompt (2 examples a class)"
    assert f"As served minus {few_shot}, greedy text: 0.733 [" in text
    assert f"As served minus {few_shot}, labels scored: 0.650 [" in text
    assert "As served minus fine-tune before conversion: -0.017 [" in text
    assert "; 1 answers differ." in text
    assert "vocabulary, left whole: -0.033 [" in text


def test_the_entries_for_the_manifest_are_valid_and_say_the_same() -> None:
    scores = {"as_served": score_evaluation(made(54))}
    (entry,) = (Accuracy.model_validate(entry) for entry in tomllib.loads(quality(scores))["quality"])
    assert (entry.what, entry.correct, entry.total) == ("fine-tune as served", 54, 60)
    assert entry.interval_low == pytest.approx(0.7985, abs=1e-3)


def test_the_majority_class_is_the_training_splits() -> None:
    score = score_evaluation(majority())
    assert len({item.prediction for item in majority().predictions}) == 1
    assert 1 / 8 < score.accuracy.estimate < 0.3
    assert sum(row.recall for row in score.classes) == 1.0


def test_pictures_are_drawn_and_repeat(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    score = score_evaluation(made(40))
    for name in ("a.png", "b.png"):
        confusion_picture(score, "made up", tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    latency_picture(run_of(arm(levels={1: [sample(0), sample(1)]})), tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_only_what_stands_between_the_marks_of_the_card_is_replaced() -> None:
    card = "before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n"
    assert with_part(card, "figures", "new\n") == "before\n<!-- figures -->\nnew\n<!-- /figures -->\nafter\n"
