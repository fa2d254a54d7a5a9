"""Child process that measures a file's speed once: `python -m convert.measure.speed_child`, its job on standard input.

Each file has a process of its own: peak memory is this file's, and an abort in C fails this candidate only.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np

from convert.child import read_job, tell
from runtime.llama.interface import Batch, LlamaLike

_SEED = 7
# As runtime/cli/main.py sets it for serving: waiting threads release a busy core.
_SPINCOUNT = "1000"
_WARM_UP_TOKENS = 32
_MOST_STEPS = 32
# Tokens of an answer before it restarts. Those of 16 sequences fit the eighth of the cells that is for decoding.
_MOST_WRITTEN = 16
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class SpeedSample:
    """One round of one file. `examples_per_s` is for examples with label rows; None without labels."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]
    examples_per_s: float | None
    peak_memory_bytes: int
    threads: int
    backend: str


@dataclass(frozen=True, slots=True)
class LoadShape:
    """Examples of `prompt` tokens and `labels` tokens after them, each of these with a row of logits.

    The prompt's last token has a row, too. A `cycle` is the length of one complete example.
    """

    prompt: int
    labels: int

    @property
    def cycle(self) -> int:
        """Tokens of one example."""
        return self.prompt + self.labels


@dataclass(frozen=True, slots=True)
class ExampleStep:
    """A batch of one sequence, which `begins` a new example in it: it must be emptied first."""

    batch: Batch
    begins: bool


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most tokens and the most rows of logits of a step, and the number of sequences."""

    n_batch: int
    n_rows: int
    n_sequences: int


def example_steps(work: LoadShape, limits: StepLimits, n_vocab: int) -> Iterator[ExampleStep]:
    """Yield the steps of example after example, on the sequences in turn, without end.

    As the engine computes them: a prompt by itself, in as many steps as it needs, then its labels.
    """
    random = np.random.default_rng(_SEED)
    for number in count():
        tokens = random.integers(0, n_vocab, work.cycle).astype(np.int32)
        start = 0
        while start < work.cycle:
            most, end = (limits.n_batch, work.prompt) if start < work.prompt else (limits.n_rows, work.cycle)
            positions = np.arange(start, min(start + min(most, limits.n_batch), end), dtype=np.int32)
            seq_ids = np.full(len(positions), number % limits.n_sequences, np.int32)
            wants_logits = (positions >= work.prompt - 1).astype(np.int8)
            yield ExampleStep(Batch(tokens[positions], positions, seq_ids, wants_logits), start == 0)
            start += len(positions)


def decode_step(lengths: list[int], n_vocab: int) -> Batch:
    """The next token of each of the sequences 0 … len(lengths)-1, which hold `lengths` tokens."""
    n = len(lengths)
    return Batch(
        tokens=np.random.default_rng(_SEED + lengths[0]).integers(0, n_vocab, n).astype(np.int32),
        positions=np.asarray(lengths, np.int32),
        seq_ids=np.arange(n, dtype=np.int32),
        wants_logits=np.ones(n, np.int8),
        rows=True,
    )


class Meter:
    """Measures a loaded model. `seconds` bounds each measurement, which has at least one step."""

    def __init__(self, llama: LlamaLike, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._llama = llama
        self._seconds = seconds
        self._clock = clock
        self._lengths: dict[int, int] = {}

    def warm_up(self) -> None:
        """Compute a few tokens, which reads every weight once."""
        self._examples(LoadShape(_WARM_UP_TOKENS, 0), 1, _WARM_UP_TOKENS, 0.0)

    def tokens_per_s(self, prompt: int, n_sequences: int) -> float:
        """Tokens a second for prompts of `prompt` tokens, one row of logits each."""
        return self._examples(LoadShape(prompt, 0), n_sequences, self._llama.info.n_batch, self._seconds)

    def examples_per_s(self, work: LoadShape, n_sequences: int) -> float:
        """Examples a second of `work`."""
        return self._examples(work, n_sequences, self._llama.info.n_batch, self._seconds) / work.cycle

    def decode_tokens_per_s(self, n_sequences: int, answer: int) -> float:
        """Decode `n_sequences` together, after the prompts computed last: tokens a second.

        They restart after `answer` tokens: a step reads all tokens before it, so a faster file that kept decoding would
        be timed on longer texts than a slower one.
        """
        lengths = self._resident(n_sequences)
        self._lengths = dict(enumerate(lengths))
        times: list[float] = []
        while not times or (sum(times) < self._seconds and len(times) < _MOST_STEPS):
            written = len(times) % min(answer, _MOST_WRITTEN)
            if written == 0:
                self._begin_again(lengths)
            batch = decode_step([length + written for length in lengths], self._llama.info.n_vocab)
            times.append(self._timed(batch))
        self._begin_again(lengths)
        return n_sequences / statistics.median(times)

    def _begin_again(self, lengths: list[int]) -> None:
        for seq_id, length in enumerate(lengths):
            self._llama.remove(seq_id, length)

    def _examples(self, work: LoadShape, n_sequences: int, n_batch: int, seconds: float) -> float:
        """Run steps for `seconds`. Returns tokens a second."""
        self._llama.clear()
        self._lengths = {}
        n_tokens, spent = 0, 0.0
        info = self._llama.info
        for step in example_steps(work, StepLimits(n_batch, info.n_seq_max, n_sequences), info.n_vocab):
            seq_id = int(step.batch.seq_ids[0])
            if step.begins:
                self._llama.remove(seq_id)
            spent += self._timed(step.batch)
            n_tokens += len(step.batch.tokens)
            self._lengths[seq_id] = int(step.batch.positions[-1]) + 1
            if spent >= seconds:
                break
        return n_tokens / spent

    def _timed(self, batch: Batch) -> float:
        """Seconds for the step, with greedy sampling of each row."""
        began = self._clock()
        self._llama.decode(batch).argmax(axis=1)
        return max(self._clock() - began, 1e-9)

    def _resident(self, n_sequences: int) -> list[int]:
        """Fill sequences 0 … n_sequences-1: those without a prompt get a copy of the longest. Returns their lengths."""
        longest = max(self._lengths, key=lambda seq_id: self._lengths[seq_id])
        for seq_id in list(self._lengths):
            if seq_id >= n_sequences and seq_id != longest:
                self._llama.remove(seq_id)
        for seq_id in range(n_sequences):
            if seq_id not in self._lengths:
                self._llama.copy_prefix(longest, seq_id, self._lengths[longest])
                self._lengths[seq_id] = self._lengths[longest]
        if longest >= n_sequences:
            self._llama.remove(longest)
        return [self._lengths[seq_id] for seq_id in range(n_sequences)]


def measure(
    meter: Meter, work: LoadShape, n_prompts: int, answer: int, decode_widths: Sequence[int]
) -> tuple[float, float | None, dict[int, float]]:
    """(prefill tokens a second, examples a second or None without labels, decode tokens a second by width)."""
    meter.warm_up()
    examples = meter.examples_per_s(work, n_prompts) if work.labels else None
    prefill = meter.tokens_per_s(work.prompt, n_prompts)
    # the widest first: each narrower one continues with some of its sequences
    decode = {n: meter.decode_tokens_per_s(n, answer) for n in sorted(decode_widths, reverse=True)}
    return prefill, examples, dict(sorted(decode.items()))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process, mapped pages of the file included."""
    if _STATUS.exists():
        # Linux's ru_maxrss includes the process this was forked from, which may be many times as large
        peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) << 10
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss << 10


def main() -> int:
    """Measure the file of the job and write the sample. Returns the exit code."""
    job = read_job()
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINCOUNT)
    # OpenMP reads the environment when llama.cpp is loaded
    from runtime.errors import EngineError
    from runtime.llama.interface import LoadOptions
    from runtime.llama.model import load

    try:
        llama = load(Path(job["gguf"]), LoadOptions(**job["load"]))
        meter = Meter(llama, job["seconds"])
        work = LoadShape(job["prompt_tokens"], job["label_tokens"])
        prefill, examples, decode = measure(meter, work, job["n_prompts"], job["answer_tokens"], job["decode_widths"])
    except EngineError as error:
        tell(str(error).replace("\n", " "))
        return 1
    info = llama.info
    sample = SpeedSample(prefill, decode, examples, peak_memory_bytes(), info.n_threads, info.backend)
    Path(job["result"]).write_text(json.dumps(asdict(sample)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
