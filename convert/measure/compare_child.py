"""Child process that measures one file: `python -m convert.measure.compare_child`, its job on standard input.

Each row of logits is used once: compared with every reference, or written, while it is in llama.cpp's memory.
"""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from convert.child import StepProgress, read_job, tell
from convert.errors import ConvertError
from runtime.errors import EngineError, RequestError
from runtime.llama.interface import LlamaLike, LoadOptions
from runtime.llama.model import load

from .compare import MeasureJob, MeasureOrder, MeasureResult, RowSet
from .forward import N_SEQ_MAX, cells_needed, run_pass
from .loss import LogitsRow, RowFile, RowLoss, log_norm, row_loss

N_BATCH = 512


def do_job(llama: LlamaLike, job: MeasureJob, progress: StepProgress) -> MeasureResult:
    """Run the tasks on the loaded model. Raises EngineError, MeasureFailed, and OSError when the disk is full."""
    with ExitStack() as files:
        keepers = [_Keeper.open(kept, files) for kept in (job.keep,) if kept is not None]
        comparers = [_Comparer.open(compared, files) for compared in job.compare]
        takers: list[_Keeper | _Comparer] = [*keepers, *comparers]
        needed = {place: row for taker in takers for place, row in taker.rows.items()}

        def on_row(row: LogitsRow, logits: np.ndarray) -> None:
            norm = log_norm(logits)
            for taker in takers:
                taker.see(row, logits, norm)

        answers = run_pass(llama, job.tasks, needed.values(), on_row, job.together, progress)
        return MeasureResult(answers, tuple(comparer.losses() for comparer in comparers))


_Rows = dict[tuple[int, int], LogitsRow]


def _by_place(row_set: RowSet) -> _Rows:
    return {(row.place, row.position): row for row in row_set.rows}


@dataclass(frozen=True, slots=True)
class _Keeper:
    """Writes the rows of a new reference to its file."""

    file: RowFile
    rows: _Rows

    @classmethod
    def open(cls, kept: RowSet, files: ExitStack) -> "_Keeper":
        return cls(files.enter_context(RowFile(Path(kept.file), kept.n_vocab, create=True)), _by_place(kept))

    def see(self, seen: LogitsRow, logits: np.ndarray, norm: float) -> None:
        """Write the row `seen` if it is one of `rows`. `norm`: the `log_norm` of its logits."""
        row = self.rows.get((seen.place, seen.position))
        if row is not None:
            self.file.write(row.number, logits, norm)


@dataclass(frozen=True, slots=True)
class _Comparer:
    """Compares rows with one reference; `found` holds the losses by row number."""

    file: RowFile
    rows: _Rows
    found: dict[int, RowLoss]

    @classmethod
    def open(cls, compared: RowSet, files: ExitStack) -> "_Comparer":
        file = files.enter_context(RowFile(Path(compared.file), compared.n_vocab))
        return cls(file, _by_place(compared), {})

    def see(self, seen: LogitsRow, logits: np.ndarray, norm: float) -> None:
        """Compare the row `seen` if it is one of `rows`. `norm`: the `log_norm` of its logits."""
        row = self.rows.get((seen.place, seen.position))
        if row is not None:
            self.found[row.number] = row_loss(self.file.read(row.number), logits, row.target, norm)

    def losses(self) -> tuple[RowLoss, ...]:
        return tuple(self.found[row.number] for row in self.rows.values())


def main() -> int:
    """Run the job on standard input. An error is one line on standard output, and the exit code 1."""
    # If llama.cpp aborts, its reason must be the last line.
    os.environ["GGML_NO_BACKTRACE"] = "1"
    try:
        order = TypeAdapter(MeasureOrder).validate_python(read_job())
        job = order.job
        options = LoadOptions(
            n_ctx=cells_needed(job.tasks, job.together), n_batch=N_BATCH, n_seq_max=N_SEQ_MAX, n_outputs=N_SEQ_MAX
        )
        outcome = do_job(load(Path(job.model), options), job, tell)
        Path(order.result).write_bytes(TypeAdapter(MeasureResult).dump_json(outcome))
    except (ConvertError, EngineError, RequestError, OSError) as error:
        tell(str(error).replace("\n", " "))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
