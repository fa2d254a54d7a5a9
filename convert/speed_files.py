"""Speeds of GGUF files beside each other, for a benchmark: `python -m convert.speed_files`, the job on standard input.

A benchmark imports nothing of conversion: it asks this process, which measures as a conversion's own table is measured.
"""

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from .child import read_job
from .errors import MeasureFailed
from .speed import Served, SpeedReport, measure_speeds


class Job(BaseModel):
    """`files`: name -> path. An example has `prompt_tokens` and `answer_tokens`; they are measured `rounds` times.

    Without `repack` weights are computed with as they lie in the file, as on a processor without AMX.
    """

    files: dict[str, Path]
    prompt_tokens: int
    answer_tokens: int
    rounds: int
    threads: int | None = None
    repack: bool = True


def speeds_of(job: Job) -> SpeedReport:
    """Measure the files in turns. Raises MeasureFailed for the first of those that cannot be measured."""
    how = Served("classify", job.prompt_tokens, job.answer_tokens, threads=job.threads, repack=job.repack)
    report = measure_speeds(job.files, how, lambda done, total: None, rounds=job.rounds)
    for reason in report.failures.values():
        raise MeasureFailed(reason)
    return report


def main() -> int:
    """Print the speeds by file as JSON. Returns 0 when done."""
    try:
        report = speeds_of(Job.model_validate(read_job()))
    except MeasureFailed as error:
        print(error, file=sys.stderr)
        return 1
    speeds = {name: speed.model_dump(mode="json") for name, speed in report.speeds.items()}
    print(json.dumps({"backend": report.backend, "speeds": speeds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
