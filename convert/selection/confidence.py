"""The confidence of the chosen file's labels, calibrated on examples that neither it nor its weights were fitted to.

Those are the examples held out for the choice and those that the importance matrix did not read. The choice looked at
the former, as the training's choice of an epoch did if they are its validation examples: that is a choice among a few,
which makes the figures slightly better than they will be on new texts.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from convert.measure.compare import MeasureJob, run_job
from convert.measure.examples import MIN_EXAMPLES
from convert.measure.forward import MAX_TOGETHER, ModelAnswer
from convert.measure.tasks import Tasks, tasks_of
from convert.planning.inputs import Examples, Inputs
from models.calibration.fit import LabelScores, ScoredExample, calibrate
from models.calibration.record import TARGETS, Calibration
from models.card.calibration import promise_told
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.common.files import sha256_file

from .cache import Cache, digest

# A pass over more takes longer than the ladder; the thresholds scarcely move any more.
MAX_EXAMPLES = 2000


def calibration_of(gguf: Path, n_in_matrix: int, inputs: Inputs, results: Path, report: Reporter) -> Calibration | None:
    """The calibration of the file to install; None for work without labels, or too few examples.

    `n_in_matrix` of the examples were read for the importance matrix. Raises MeasureFailed and as `tasks_of`.
    """
    examples = inputs.examples
    if examples is None or examples.work != "classify":
        return None
    records = _unseen(examples, n_in_matrix)
    if len(records) < MIN_EXAMPLES // 2:
        return None
    tasks = tasks_of(gguf, records, examples.work, examples.labels, inputs.manifest.prompt)
    answers = _answers(gguf, tasks, results, report)
    scores = LabelScores(
        model=inputs.manifest.name,
        labels=tasks.labels,
        examples=tuple(
            ScoredExample(id=task.id, label=task.expected, logprobs=answer.logprobs)
            for task, answer in zip(tasks.tasks, answers, strict=True)
        ),
    )
    targets = inputs.targets or TARGETS
    found = calibrate(scores, targets, inputs.targets[0] if inputs.targets else None, examples.path.name)
    for promise in found.promises:
        report.note(f"automatic answers, right with a share of {promise_told(promise, found.examples)}")
    return found


def _unseen(examples: Examples, n_in_matrix: int) -> Sequence[ChatRecord]:
    return (*examples.split.held_out, *examples.split.calibration[n_in_matrix:])[:MAX_EXAMPLES]


def _answers(gguf: Path, tasks: Tasks, results: Path, report: Reporter) -> tuple[ModelAnswer, ...]:
    """The chosen file's answers with the log-probabilities of all labels, exact as `/v1/decisions` computes them."""

    def measure() -> tuple[ModelAnswer, ...]:
        report.stage("calibrate the confidence", len(tasks.tasks))
        job = MeasureJob(str(gguf), tasks, MAX_TOGETHER)
        return run_job(job, gguf.parent, report.advance).answers

    cache = Cache(results, [sha256_file(gguf), digest(tasks)])
    return cache.value(TypeAdapter(tuple[ModelAnswer, ...]), "labels", [], measure)
