"""A model's answers judged beside the reference's: labels by right and wrong, texts by a score from 0 to 1. Pure.

A text that differs from the reference's by a word may be as good, so texts are not counted as right or changed but
scored against the example's own answer. Another kind of written answer needs a line in METRICS.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.common.stats import bootstrap_mean, compare_paired
from models.common.text_scores import rouge_l
from models.quality import Answers, MeanScore, TaskKind

from .forward import ModelAnswer
from .tasks import EvalTask, Tasks

# By name: (expected text, given text) -> 0 … 1.
METRICS: Mapping[str, Callable[[str, str], float]] = {"ROUGE-L": rouge_l}


def metric_for(work: TaskKind) -> str | None:
    """The name of the score for answers of this work; None where an answer is only right or wrong."""
    return None if work == "classify" else "ROUGE-L"


@dataclass(frozen=True, slots=True)
class ExampleResult:
    """One example with both answers. `kl_mean` is over its answer's rows, in nats; None if no row can be compared.

    `likeness`, 0 … 1, is that of the two answers. The scores are those against `expected`; None for labels.
    """

    id: str
    expected: str
    answer: str
    reference_answer: str
    is_right: bool
    was_right: bool
    is_flipped: bool
    likeness: float
    score: float | None = None
    reference_score: float | None = None
    kl_mean: float | None = None


def judge(
    tasks: Tasks,
    answers: Sequence[ModelAnswer],
    reference_answers: Sequence[ModelAnswer],
    kl: Mapping[int, Sequence[float]] | None = None,
) -> tuple[ExampleResult, ...]:
    """Judge `answers`, in the order of the tasks. `kl` holds the KL divergences of a task's rows, by its index."""
    pairs = zip(tasks.tasks, answers, reference_answers, strict=True)
    return tuple(
        _judged(tasks.work, task, answer, reference, (kl or {}).get(place, ()))
        for place, (task, answer, reference) in enumerate(pairs)
    )


def totals(work: TaskKind, examples: Sequence[ExampleResult]) -> Answers:
    """The paired comparison over all `examples`."""
    right = [one.is_right for one in examples]
    paired = compare_paired(right, [one.was_right for one in examples])
    return Answers(
        total=len(right),
        correct=sum(right),
        flips=sum(one.is_flipped for one in examples),
        difference_low=paired.difference.low,
        difference_high=paired.difference.high,
        p_value=paired.p_value,
        score=_score(metric_for(work), examples),
    )


def is_right(work: TaskKind, answer: ModelAnswer, task: EvalTask) -> bool:
    """True for the expected label, or the expected text up to white space and Unicode normalisation.

    A text that was cut off is right if the expected one begins with it.
    """
    if work == "classify":
        return answer.text == task.expected
    given, expected = normalised(answer.text), normalised(task.expected)
    return given == expected or (answer.cut_off and given != "" and expected.startswith(given))


def normalised(text: str) -> str:
    """`text` in NFC, each run of white space replaced by a space, stripped."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _judged(
    work: TaskKind, task: EvalTask, answer: ModelAnswer, reference: ModelAnswer, kl: Sequence[float]
) -> ExampleResult:
    metric = metric_for(work)
    rate = METRICS[metric] if metric is not None else None
    is_flipped = normalised(answer.text) != normalised(reference.text)
    likeness = rate(reference.text, answer.text) if rate is not None and is_flipped else float(not is_flipped)
    return ExampleResult(
        id=task.id,
        expected=task.expected,
        answer=answer.text,
        reference_answer=reference.text,
        is_right=is_right(work, answer, task),
        was_right=is_right(work, reference, task),
        is_flipped=is_flipped,
        likeness=likeness,
        score=rate(task.expected, answer.text) if rate is not None else None,
        reference_score=rate(task.expected, reference.text) if rate is not None else None,
        kl_mean=float(np.mean(kl)) if kl else None,
    )


def _score(metric: str | None, examples: Sequence[ExampleResult]) -> MeanScore | None:
    pairs = [(one.score, one.reference_score) for one in examples]
    scored = [(mine, before) for mine, before in pairs if mine is not None and before is not None]
    if metric is None or not scored:
        return None
    difference = bootstrap_mean([mine - before for mine, before in scored])
    return MeanScore(
        metric=metric,
        mean=float(np.mean([mine for mine, _ in scored])),
        reference_mean=float(np.mean([before for _, before in scored])),
        difference_low=difference.low,
        difference_high=difference.high,
    )
