"""Labels are right or wrong; written texts get a score, and the mean difference of two models has a paired interval."""

from collections.abc import Sequence

import pytest

from convert.measure.answers import METRICS, is_right, judge, metric_for, totals
from convert.measure.forward import ModelAnswer
from convert.measure.tasks import EvalTask, Tasks
from models.common.stats import bootstrap_mean
from models.common.text_scores import rouge_l
from models.quality import Answers, TaskKind

WANTED = [f"tool number {n} for reading mail" for n in range(20)]


def answered(work: TaskKind, given: Sequence[str], before: Sequence[str], wanted: Sequence[str] = WANTED) -> Answers:
    tasks = tuple(EvalTask(str(n), (1,), (2,), text) for n, text in enumerate(wanted))
    asked = Tasks(work, tasks, (), (), (1,), 10)
    return totals(work, judge(asked, [*map(ModelAnswer, given)], [*map(ModelAnswer, before)]))


def test_another_wording_changes_the_text_and_not_the_score() -> None:
    before = [f"reading mail tool {n}" for n in range(20)]
    given = [f"mail reading tool {n}" for n in range(20)]
    answers = answered("write", given, before)
    assert (answers.flips, answers.correct) == (20, 0)
    assert answers.score is not None
    assert answers.score.metric == metric_for("write") == "ROUGE-L"
    assert answers.score.mean == pytest.approx(answers.score.reference_mean)
    assert answers.score.difference_low <= 0 <= answers.score.difference_high


def test_the_difference_is_paired() -> None:
    """Each answer lacks the same word: the scores vary from example to example, their difference hardly does."""
    wanted = [f"{'a ' * n}tool for mail" for n in range(20)]
    given = [text.removesuffix(" mail") for text in wanted]
    score = answered("write", given, wanted, wanted).score
    assert score is not None
    differences = [rouge_l(text, one) - 1 for text, one in zip(wanted, given, strict=True)]
    interval = bootstrap_mean(differences)
    assert score.difference == pytest.approx(interval.estimate)
    assert (score.difference_low, score.difference_high) == (interval.low, interval.high)
    assert score.difference_high < 0
    assert score == answered("write", given, wanted, wanted).score


def test_labels_are_counted_and_not_scored() -> None:
    answers = answered("classify", ["a"] * 15 + ["b"] * 5, ["a"] * 20, ["a"] * 20)
    assert (answers.correct, answers.flips, answers.score) == (15, 5, None)
    assert metric_for("classify") is None


def test_likeness_is_graded_for_texts_and_not_for_labels() -> None:
    task = (EvalTask("1", (1,), (2,), "x"),)
    pairs = [("a b c", "a b d"), ("same", "same"), ("...", "...")]
    for work, wanted in (("write", [METRICS["ROUGE-L"]("a b d", "a b c"), 1, 1]), ("classify", [0, 1, 1])):
        asked = Tasks("write" if work == "write" else "classify", task, (), (), (1,), 10)
        found = [judge(asked, [ModelAnswer(one)], [ModelAnswer(other)])[0].likeness for one, other in pairs]
        assert found == wanted


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (ModelAnswer("Dear  Ann,\nyes. "), "Dear Ann, yes.", True),
        (ModelAnswer("cafe\u0301"), "café", True),
        (ModelAnswer("Dear Ann"), "Dear Ann, yes.", False),
        (ModelAnswer("Dear Ann", cut_off=True), "Dear Ann, yes.", True),
        (ModelAnswer("", cut_off=True), "Dear Ann, yes.", False),
    ],
)
def test_a_text_is_right_but_for_white_space_and_as_far_as_it_goes(
    answer: ModelAnswer, expected: str, right: bool
) -> None:
    assert is_right("write", answer, EvalTask("1", (1,), (2,), expected)) is right


def test_a_label_is_right_to_the_letter() -> None:
    assert is_right("classify", ModelAnswer("ham"), EvalTask("1", (1,), (2,), "ham"))
    assert not is_right("classify", ModelAnswer("Ham"), EvalTask("1", (1,), (2,), "ham"))
