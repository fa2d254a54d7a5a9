"""The process that measures one file's speed once: `python -m convert.measure.speed_child`, the job on its input.

One file a process, so that peak memory is this file's and an abort in C is this candidate's fault alone.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from convert.child import read_job, tell
from runtime.llama.interface import Batch, LlamaLike

_SEED = 7


@dataclass(frozen=True, slots=True)
class LoadShape:
    """Examples of `prompt` tokens, after which `labels` tokens more are computed, a row of logits for each of them.

    The prompt's last token has its row too. A `cycle` is what a sequence holds when its example is done.
    """

    prompt: int
    labels: int

    @property
    def cycle(self) -> int:
        """Tokens computed for one example."""
        return self.prompt + self.labels


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A batch, and the sequences that begin a new example in it: what they held before has to go first."""

    batch: Batch
    begun: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """A step's most tokens, its most rows of logits, and how many sequences there are."""

    n_batch: int
    n_rows: int
    n_sequences: int


def packed_steps(work: LoadShape, limits: StepLimits, n_vocab: int) -> Iterator[PackedStep]:
    """Steps as large as `limits` allow, without end: one example follows the other, on the sequences in turn.

    An example may go on in the next step. A sequence never has two examples in one step.
    """
    random = np.random.default_rng(_SEED)
    done = 0
    while True:
        # no example of this step may be on the sequence of another one of it
        last = (done // work.cycle + limits.n_sequences) * work.cycle
        flat = np.arange(done, min(done + limits.n_batch, last))
        flat = flat[np.cumsum(flat % work.cycle >= work.prompt - 1) <= limits.n_rows]
        done = int(flat[-1]) + 1
        positions = flat % work.cycle
        wants_logits = positions >= work.prompt - 1
        seq_ids = flat // work.cycle % limits.n_sequences
        tokens = random.integers(0, n_vocab, len(flat))
        batch = Batch(
            tokens=tokens.astype(np.int32),
            positions=positions.astype(np.int32),
            seq_ids=seq_ids.astype(np.int32),
            wants_logits=wants_logits.astype(np.int8),
        )
        yield PackedStep(batch, tuple(int(seq_id) for seq_id in seq_ids[positions == 0]))


def decode_step(lengths: list[int], n_vocab: int) -> Batch:
    """One token more for each of the sequences 0 … len(lengths)-1, which hold `lengths` tokens."""
    n = len(lengths)
    return Batch(
        tokens=np.random.default_rng(_SEED + lengths[0]).integers(0, n_vocab, n).astype(np.int32),
        positions=np.asarray(lengths, np.int32),
        seq_ids=np.arange(n, dtype=np.int32),
        wants_logits=np.ones(n, np.int8),
    )


# As runtime/cli/main.py sets it for serving: threads that wait give a busy core back.
_SPINCOUNT = "1000"
_WARM_UP_TOKENS = 32
_MOST_STEPS = 32
# Of an answer, before it begins again. So many of 16 sequences fit the eighth of the cells that is left to them.
_MOST_WRITTEN = 16
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class SpeedSample:
    """One round of one file. `examples_per_s` is of packed examples with their labels' rows; None if there are none."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: dict[int, float]
    examples_per_s: float | None
    peak_memory_bytes: int
    threads: int
    backend: str


class Meter:
    """A loaded model and a clock. `seconds` bounds each measurement, which has one step at least."""

    def __init__(self, llama: LlamaLike, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._llama = llama
        self._seconds = seconds
        self._clock = clock
        self._lengths: dict[int, int] = {}

    def warm_up(self) -> None:
        """Compute a few tokens: touches every weight once."""
        self._packed(LoadShape(_WARM_UP_TOKENS, 0), 1, _WARM_UP_TOKENS, 0.0)

    def tokens_per_s(self, prompt: int, n_sequences: int) -> float:
        """Prompts of `prompt` tokens, one row of logits each, packed into whole steps: tokens a second."""
        return self._packed(LoadShape(prompt, 0), n_sequences, self._llama.info.n_batch, self._seconds)

    def examples_per_s(self, work: LoadShape, n_sequences: int) -> float:
        """Examples a second of `work`, packed into whole steps."""
        return self._packed(work, n_sequences, self._llama.info.n_batch, self._seconds) / work.cycle

    def decode_tokens_per_s(self, n_sequences: int, answer: int) -> float:
        """`n_sequences` that write a token each a step, after the prompts computed last: tokens a second.

        They begin again after `answer` tokens. A step reads all that stands before it, so a faster file that wrote on
        and on would be timed on longer texts than a slower one.
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

    def _packed(self, work: LoadShape, n_sequences: int, n_batch: int, seconds: float) -> float:
        """Tokens a second."""
        self._llama.clear()
        self._lengths = {}
        n_tokens, spent = 0, 0.0
        info = self._llama.info
        for step in packed_steps(work, StepLimits(n_batch, info.n_seq_max, n_sequences), info.n_vocab):
            for seq_id in step.begun:
                self._llama.remove(seq_id)
            spent += self._timed(step.batch)
            n_tokens += len(step.batch.tokens)
            for seq_id, position in zip(step.batch.seq_ids.tolist(), step.batch.positions.tolist(), strict=True):
                self._lengths[seq_id] = position + 1
            if spent >= seconds:
                break
        return n_tokens / spent

    def _timed(self, batch: Batch) -> float:
        """Seconds for the step, with the look at each row that greedy sampling takes."""
        began = self._clock()
        self._llama.decode(batch).argmax(axis=1)
        return max(self._clock() - began, 1e-9)

    def _resident(self, n_sequences: int) -> list[int]:
        """Sequences 0 … n_sequences-1 with a prompt each: their own where there is one, else they share the longest."""
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
    # the widest first: each narrower one goes on with some of its sequences
    decode = {n: meter.decode_tokens_per_s(n, answer) for n in sorted(decode_widths, reverse=True)}
    return prefill, examples, dict(sorted(decode.items()))


def main() -> int:
    """Measure as the job says and write the sample where it says. Returns 0 when done."""
    job = read_job()
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINCOUNT)
    # llama.cpp's threads read the environment when they are loaded
    from runtime.errors import EngineError
    from runtime.llama.model import LoadOptions, load

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


def peak_memory_bytes() -> int:
    """The most memory this process has had resident, the file's mapped pages included."""
    if _STATUS.exists():
        # Linux counts into ru_maxrss what the process was forked from, which may be many times as large
        peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) << 10
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss << 10


if __name__ == "__main__":
    sys.exit(main())
