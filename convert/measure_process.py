"""A file is measured in a process of its own: what aborts in llama.cpp is one candidate's fault, not the conversion's.

What goes in and comes out are typed values as JSON files; the child's output tells how far it is, and what went wrong.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import MeasureFailed
from .measure_loss import RowLoss
from .measure_pass import Answer
from .measure_rows import Row
from .measure_tasks import Tasks

STEP, ERROR = "step", "error: "
_ASSERTION = "GGML_ASSERT"

Progress = Callable[[int, int], None]
T = TypeVar("T")


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

    Of its own rows it writes `keep` to a new file; or it compares them with each of `compare`.
    """

    model: str
    tasks: Tasks
    together: int
    keep: RowSet | None = None
    compare: tuple[RowSet, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a child found: an answer for each task, and for each comparison the losses in the order of its rows."""

    answers: tuple[Answer, ...]
    losses: tuple[tuple[RowLoss, ...], ...]


def run_job(job: Job, folder: Path, progress: Progress) -> Outcome:
    """Do `job` in a child process, with its files in `folder`. `progress` is told (examples done, in all).

    Raises MeasureFailed with the child's last word. However it ends, the child has ended too and its files are gone.
    """
    order, result = folder / "job.json", folder / "outcome.json"
    try:
        order.write_bytes(TypeAdapter(Job).dump_json(job))
        complaint = _watch(job, [str(order), str(result)], progress)
        if complaint is not None:
            raise MeasureFailed(f"{Path(job.model).name!r} cannot be measured: {complaint}")
        return read_value(Outcome, result)
    finally:
        order.unlink(missing_ok=True)
        result.unlink(missing_ok=True)


def read_value(kind: type[T], file: Path) -> T:
    """A value of type `kind` from a JSON file. Raises MeasureFailed."""
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise MeasureFailed(f"{str(file)!r} cannot be read: {error}") from error


def _watch(job: Job, arguments: list[str], progress: Progress) -> str | None:
    """Run the child to its end; why it failed, if it did."""
    # -P: a folder called `convert` where the user stands must not be taken for ours
    command = [sys.executable, "-P", "-m", "convert.measure_child", *arguments]
    said = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as it:
        try:
            assert it.stdout is not None
            for line in it.stdout:
                if line.startswith(STEP):
                    progress(*map(int, line.split()[1:3]))
                elif line.strip() and not said.startswith(ERROR) and _ASSERTION not in said:
                    said = line.strip()
            code = it.wait()
        except BaseException:
            it.kill()
            raise
    if code == 0:
        return None
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return said.removeprefix(ERROR) if said.startswith(ERROR) else f"{end}: {said or 'no word from it'}"
