"""A file is measured in a process of its own: what aborts in llama.cpp is one candidate's fault, not the conversion's.

What goes in and comes out are typed values, as JSON.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from .child import run_child
from .errors import MeasureFailed
from .measure_loss import RowLoss
from .measure_pass import Answer
from .measure_rows import Row
from .measure_tasks import Tasks

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class RowSet:
    """A reference's rows on disk, each `n_vocab` wide, and those of them that are meant.

    `kept` maps a candidate's token ids to the reference's; None: they are the same.
    """

    file: str
    n_vocab: int
    rows: tuple[Row, ...]
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What a child does: `tasks` with the file `model`, `together` at once.

    Of its own rows it writes `keep` to a new file, and compares them with each of `compare`.
    """

    model: str
    tasks: Tasks
    together: int
    keep: RowSet | None = None
    compare: tuple[RowSet, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """A job, and the file that its outcome is to be written to."""

    job: Job
    result: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a child found: an answer for each task, and for each comparison the losses in the order of its rows."""

    answers: tuple[Answer, ...]
    losses: tuple[tuple[RowLoss, ...], ...]


def run_job(job: Job, folder: Path, progress: Progress) -> Outcome:
    """Do `job` in a child process, which leaves what it found in `folder`. `progress`: (examples done, in all).

    Raises MeasureFailed with the child's last word. However this ends, the child has ended too and its file is gone.
    """
    result = folder / "outcome.json"
    order = TypeAdapter(Order).dump_python(Order(job, str(result)), mode="json")
    try:
        code, complaint = run_child("convert.measure_child", order, progress)
        if code != 0:
            end = f"{signal.Signals(-code).name}: " if code < 0 else ""
            raise MeasureFailed(f"{Path(job.model).name!r} cannot be measured: {end}{complaint}")
        return TypeAdapter(Outcome).validate_json(result.read_bytes())
    except (OSError, ValidationError) as error:
        raise MeasureFailed(f"{Path(job.model).name!r} cannot be measured: {error}") from error
    finally:
        result.unlink(missing_ok=True)
