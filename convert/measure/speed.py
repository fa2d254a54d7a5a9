"""Speed and memory of each candidate on this machine, measured with the server's settings.

Candidates are measured in rounds of alternating order (A B C, C B A …), so that a change of the machine affects all
alike. Each measurement runs in a process of its own.

`python -m convert.measure.speed` measures the files of a `SpeedJob` on standard input and prints their speeds as JSON.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from convert.child import StepProgress, read_job, run_child
from convert.errors import MeasureFailed
from models.quality import Shape, Speed, TaskKind
from runtime.config import RuntimeConfig

from .speed_child import SpeedSample
from .tasks import Tasks

ROUNDS = 3
# For each measurement of a round: prefill, examples, and every width of decoding. At least one step.
SECONDS = 0.5
DECODE_WIDTHS = (1, 8, 16)
# Speeds are measured as the server runs by default.
SERVER = RuntimeConfig()


@dataclass(frozen=True)
class ServingLoad:
    """The typical example (medians, in tokens) and the settings it is served with, by default the server's."""

    work: TaskKind
    prompt_tokens: int
    answer_tokens: int
    sequences: int = SERVER.slots
    step_tokens: int = SERVER.step_tokens
    context: int = SERVER.context
    threads: int | None = None
    repack: bool = True

    @property
    def n_prompts(self) -> int:
        """Number of examples that the KV cache holds side by side, at most one for each slot."""
        # an eighth of the cells is for decoding after them
        return max(1, min(self.sequences, self.context * 7 // 8 // (self.prompt_tokens + self.answer_tokens)))


@dataclass(frozen=True)
class SpeedReport:
    """Speeds by candidate, and the reason for those without. `shape` is the load, `backend` the hardware."""

    speeds: Mapping[str, Speed]
    scores: Mapping[str, float]
    failures: Mapping[str, str]
    shape: Shape | None
    backend: str


Measure = Callable[[Path], SpeedSample]


def serving_load(tasks: Tasks) -> ServingLoad:
    """The typical example of `tasks`: median lengths of prompt and answer, in tokens, cut to what the context holds."""
    prompt = round(statistics.median(len(task.prompt) for task in tasks.tasks))
    answer = round(statistics.median(len(task.answer) for task in tasks.tasks))
    # the rest of the cells is for decoding
    most = SERVER.context // 2
    return ServingLoad(tasks.work, max(1, min(prompt, most)), max(1, min(answer, most // 2)))


def measure_speeds(
    files: Mapping[str, Path],
    how: ServingLoad,
    progress: StepProgress,
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    measure: Measure | None = None,
) -> SpeedReport:
    """Measure `files`, by candidate's name, `rounds` times. `progress` is called with (measurements done, in all).

    A candidate that fails once is not measured again. `measure` replaces the child process.
    """
    once = measure or (lambda file: _in_child(file, how, seconds))
    samples: dict[str, list[SpeedSample]] = {name: [] for name in files}
    failures: dict[str, str] = {}
    done = 0
    for number in range(rounds):
        for name in order_of(list(files), number):
            if name not in failures:
                try:
                    samples[name].append(once(files[name]))
                except MeasureFailed as error:
                    failures[name] = str(error)
            done += 1
            progress(done, rounds * len(files))
    whole = {name: taken for name, taken in samples.items() if name not in failures}
    speeds = {name: _speed(taken, how) for name, taken in whole.items()}
    scores = {name: statistics.median(speed.score_samples_per_s) for name, speed in speeds.items()}
    first = next((taken[0] for taken in whole.values()), None)
    shape = None if first is None else _shape(how, first.threads, rounds)
    return SpeedReport(speeds, scores, failures, shape, "" if first is None else first.backend)


def order_of(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: forward in even rounds, reversed in odd ones."""
    return list(names) if number % 2 == 0 else list(reversed(names))


def score(sample: SpeedSample, how: ServingLoad) -> float:
    """Examples a second for the stated work.

    To classify, the sample has measured it. To write, an example takes its prompt's prefill and its answer's tokens at
    the rate at which `sequences` decode together.
    """
    if sample.examples_per_s is not None:
        return sample.examples_per_s
    decode = sample.decode_tokens_per_s[max(sample.decode_tokens_per_s)]
    return 1 / (how.prompt_tokens / sample.prefill_tokens_per_s + how.answer_tokens / decode)


def _speed(samples: Sequence[SpeedSample], how: ServingLoad) -> Speed:
    widths = samples[0].decode_tokens_per_s
    return Speed(
        prefill_tokens_per_s=statistics.median(sample.prefill_tokens_per_s for sample in samples),
        decode_tokens_per_s={
            width: statistics.median(sample.decode_tokens_per_s[width] for sample in samples) for width in widths
        },
        peak_memory_bytes=max(sample.peak_memory_bytes for sample in samples),
        score_samples_per_s=tuple(score(sample, how) for sample in samples),
    )


def _shape(how: ServingLoad, threads: int, rounds: int) -> Shape:
    return Shape(
        prompt_tokens=how.prompt_tokens,
        answer_tokens=how.answer_tokens,
        sequences=how.sequences,
        step_tokens=how.step_tokens,
        threads=threads,
        rounds=rounds,
    )


def _in_child(file: Path, how: ServingLoad, seconds: float) -> SpeedSample:
    """Measure once, in a child process. Raises MeasureFailed with its last message."""
    # the server's settings: see `runtime/serving/model.py`
    load: dict[str, object] = {"n_ctx": how.context, "n_batch": how.step_tokens, "n_seq_max": how.sequences}
    load |= {"n_threads": how.threads, "repack": how.repack, "prefill": SERVER.prefill, "streams": True}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "sample.json"
        job = {
            "gguf": str(file),
            "load": load,
            "prompt_tokens": how.prompt_tokens,
            "label_tokens": how.answer_tokens if how.work == "classify" else 0,
            "answer_tokens": how.answer_tokens,
            "n_prompts": how.n_prompts,
            "decode_widths": DECODE_WIDTHS,
            "seconds": seconds,
            "result": str(result),
        }
        code, complaint = run_child("convert.measure.speed_child", job, lambda done, total: None)
        if code != 0:
            raise MeasureFailed(f"{file.name!r}: speed cannot be measured (exit code {code}): {complaint}")
        return TypeAdapter(SpeedSample).validate_json(result.read_bytes())


class SpeedJob(BaseModel):
    """`files`: name -> path. An example has `prompt_tokens` and `answer_tokens`; they are measured `rounds` times.

    Without `repack` weights keep the layout they have in the file, as on a processor without AMX.
    """

    files: dict[str, Path]
    prompt_tokens: int
    answer_tokens: int
    rounds: int
    threads: int | None = None
    repack: bool = True


def speeds_of(job: SpeedJob) -> SpeedReport:
    """Measure the files in turns. Raises MeasureFailed for the first of those that cannot be measured."""
    how = ServingLoad("classify", job.prompt_tokens, job.answer_tokens, threads=job.threads, repack=job.repack)
    report = measure_speeds(job.files, how, lambda done, total: None, rounds=job.rounds)
    for reason in report.failures.values():
        raise MeasureFailed(reason)
    return report


def main() -> int:
    """Print the speeds by file as JSON. Returns 0 when done."""
    try:
        report = speeds_of(SpeedJob.model_validate(read_job()))
    except MeasureFailed as error:
        print(error, file=sys.stderr)
        return 1
    speeds = {name: speed.model_dump(mode="json") for name, speed in report.speeds.items()}
    print(json.dumps({"backend": report.backend, "speeds": speeds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
