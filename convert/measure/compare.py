"""The loss of a candidate against a reference, usually the F16 file, on held-out examples.

The reference is run once: its answers are kept in memory, its log-probabilities at the compared rows on disk. Any file
with the same vocabulary can then be compared with it, or with several references in one pass: a candidate with the
fine-tune and with its base, or the reference with itself at another batch size, which is the noise floor. A file that
becomes a reference itself, like the base, is compared in the same pass.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from convert.child import StepProgress, run_child
from convert.errors import MeasureFailed
from models.quality import Answers, Loss

from .answers import ExampleResult, judge, totals
from .forward import MAX_TOGETHER, ModelAnswer
from .loss import STORED, LogitsRow, RowLoss, plan_rows, summarise
from .tasks import Tasks

ALONE = 1
# One example at a time takes three times as long as many, and the floor is orders of magnitude below any budget.
NOISE_EXAMPLES = 32
ROWS_FILE = "rows.f16"


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """A reference: `model`'s answer to each of `tasks`, and its `rows`, which are stored in `rows_file`.

    `beside` holds its own losses against the references taken before it.
    """

    model: Path
    tasks: Tasks
    answers: tuple[ModelAnswer, ...]
    rows: tuple[LogitsRow, ...]
    rows_file: Path
    beside: "tuple[MeasuredLoss, ...]" = ()

    @property
    def totals(self) -> Answers:
        """The answers compared with themselves: none is flipped, and no difference is left."""
        return totals(self.tasks.work, judge(self.tasks, self.answers, self.answers))


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """The loss of a file against a reference. `loss` is None if there is no row to compare."""

    loss: Loss | None
    answers: Answers
    examples: tuple[ExampleResult, ...]


def rows_bytes(tasks: Tasks) -> int:
    """The bytes on disk that `take_reference` needs."""
    return len(plan_rows(tasks)) * tasks.n_vocab * STORED.itemsize


def take_reference(
    model: Path, tasks: Tasks, folder: Path, progress: StepProgress, beside: Sequence[ReferenceRun] = ()
) -> ReferenceRun:
    """Run the GGUF `model` through `tasks` and write its rows to `folder`, which is created if it is missing.

    The same pass compares it with the references `beside`, which have the same tasks. `progress` is called with
    (examples done, examples in all), here and below. Raises MeasureFailed, also when the disk is full, and leaves no
    rows then.
    """
    _check_tasks(model, beside, tasks)
    folder.mkdir(parents=True, exist_ok=True)
    rows_file = folder / ROWS_FILE
    rows = plan_rows(tasks)
    rows_file.unlink(missing_ok=True)
    keep, compared = RowSet(str(rows_file), tasks.n_vocab, rows), _row_sets(beside)
    try:
        outcome = run_job(MeasureJob(str(model), tasks, MAX_TOGETHER, keep, compared), folder, progress)
    except BaseException:
        rows_file.unlink(missing_ok=True)
        raise
    return ReferenceRun(model, tasks, outcome.answers, rows, rows_file, _all_measured(outcome, beside))


def compare(
    candidate: Path,
    references: Sequence[ReferenceRun],
    progress: StepProgress,
    *,
    together: int = MAX_TOGETHER,
) -> tuple[MeasuredLoss, ...]:
    """Compare the GGUF `candidate` with each of `references`, which all have the same tasks, in one pass.

    `together` examples are computed at once. Raises MeasureFailed if the file does not load or run, has another
    vocabulary, or its process dies.
    """
    tasks = references[0].tasks
    _check_tasks(candidate, references, tasks)
    job = MeasureJob(str(candidate), tasks, together, compare=_row_sets(references))
    outcome = run_job(job, references[0].rows_file.parent, progress)
    return _all_measured(outcome, references)


def noise(reference: ReferenceRun, progress: StepProgress) -> MeasuredLoss:
    """Measurement noise: the reference compared with itself at another batch size, one example at a time.

    It covers the first NOISE_EXAMPLES examples, a random sample: held-out examples are in the order of their hashes.
    """
    asked = replace(reference.tasks, tasks=reference.tasks.tasks[:NOISE_EXAMPLES])
    rows = tuple(row for row in reference.rows if row.place < NOISE_EXAMPLES)
    part = replace(reference, tasks=asked, answers=reference.answers[:NOISE_EXAMPLES], rows=rows)
    (measured,) = compare(reference.model, (part,), progress, together=ALONE)
    return measured


@dataclass(frozen=True, slots=True)
class RowSet:
    """The subset `rows` of a reference's rows in `file`, each `n_vocab` wide."""

    file: str
    n_vocab: int
    rows: tuple[LogitsRow, ...]


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """The job of a child process: run `tasks` with the file `model`, `together` at once.

    The child writes the rows `keep` to a new file and compares its rows with each of `compare`.
    """

    model: str
    tasks: Tasks
    together: int
    keep: RowSet | None = None
    compare: tuple[RowSet, ...] = ()


@dataclass(frozen=True, slots=True)
class MeasureOrder:
    """A job, and the file for its result."""

    job: MeasureJob
    result: str


@dataclass(frozen=True, slots=True)
class MeasureResult:
    """The result of a job: an answer for each task, and for each comparison the losses in the order of its rows."""

    answers: tuple[ModelAnswer, ...]
    losses: tuple[tuple[RowLoss, ...], ...]


def run_job(job: MeasureJob, folder: Path, progress: StepProgress) -> MeasureResult:
    """Run `job` in a child process, which writes its result to `folder`. `progress`: (examples done, in all).

    Raises MeasureFailed with the child's last message. On every exit the child has ended and its file is deleted.
    """
    result = folder / "outcome.json"
    order = TypeAdapter(MeasureOrder).dump_python(MeasureOrder(job, str(result)), mode="json")
    try:
        code, complaint = run_child("convert.measure.compare_child", order, progress)
        if code != 0:
            end = f"{signal.Signals(-code).name}: " if code < 0 else ""
            raise MeasureFailed(f"{Path(job.model).name!r} cannot be measured: {end}{complaint}")
        return TypeAdapter(MeasureResult).validate_json(result.read_bytes())
    except (OSError, ValidationError) as error:
        raise MeasureFailed(f"{Path(job.model).name!r} cannot be measured: {error}") from error
    finally:
        result.unlink(missing_ok=True)


def _check_tasks(file: Path, references: Sequence[ReferenceRun], tasks: Tasks) -> None:
    if any(reference.tasks != tasks for reference in references):
        raise MeasureFailed(f"{file.name!r}: the references were not asked the same tasks")


def _row_sets(references: Sequence[ReferenceRun]) -> tuple[RowSet, ...]:
    return tuple(RowSet(str(reference.rows_file), reference.tasks.n_vocab, reference.rows) for reference in references)


def _all_measured(outcome: MeasureResult, references: Sequence[ReferenceRun]) -> tuple[MeasuredLoss, ...]:
    return tuple(
        _measured(outcome.answers, reference, losses)
        for reference, losses in zip(references, outcome.losses, strict=True)
    )


def _measured(answers: Sequence[ModelAnswer], reference: ReferenceRun, losses: Sequence[RowLoss]) -> MeasuredLoss:
    of_answer: dict[int, list[float]] = {}
    for row, loss in zip(reference.rows, losses, strict=True):
        of_answer.setdefault(row.place, []).append(loss.kl)
    examples = judge(reference.tasks, answers, reference.answers, of_answer)
    return MeasuredLoss(summarise(losses), totals(reference.tasks.work, examples), examples)
