"""Times prompts in one process, in turns: a job as JSON on stdin, raw seconds as JSON on stdout.

`stock` is llama.cpp as it comes, one KV cache for all sequences; `own` what the server computes with, in streams. Rows
of answers are computed behind prompts of BEHIND tokens, prompts in an empty cache.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.llama.interface import Batch, LoadOptions
from runtime.llama.model import Llama, load

Step = list[list[int]]  # (sequence, tokens) of each part
BEHIND = 100
KINDS: tuple[Literal["stock", "own"], ...] = ("stock", "own")


def main() -> None:
    """Load the file once for each of the job's `kinds` of products and compute each step with all of them in turn."""
    job: dict[str, Any] = json.load(sys.stdin)
    kinds: tuple[Literal["stock", "own"], ...] = tuple(job.get("kinds", KINDS))
    n_batch = max(BEHIND, *(sum(n for _, n in step) for step in job["steps"].values()))
    cells = max(n_batch, *(BEHIND * len(step) for step in job["steps"].values()))
    options: dict[str, Any] = {"n_ctx": 2 * cells, "n_batch": n_batch, "n_seq_max": 16, "n_threads": job["threads"]}
    models = {
        kind: load(Path(job["gguf"]), LoadOptions(**options, prefill=kind, streams=kind == "own")) for kind in kinds
    }
    info = models[kinds[-1]].info
    rng = np.random.default_rng(0)
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, step in job["steps"].items():
        seconds[name] = {kind: [] for kind in models}
        start = BEHIND if all(n == 1 for _, n in step) else 0
        for llama in models.values():
            llama.clear()
            for seq, _ in step if start else ():
                llama.decode(_batch([[seq, start]], 0, rng.integers(0, info.n_vocab, start)))
        for number in range(job["repetitions"] + 1):
            batch = _batch(step, start, rng.integers(0, info.n_vocab, sum(n for _, n in step)))
            for kind in kinds if number % 2 else kinds[::-1]:
                took = _timed(models[kind], batch)
                for seq, _ in step:
                    models[kind].remove(seq, start)
                if number > 0:
                    seconds[name][kind].append(took)
    json.dump({"seconds": seconds, "backend": info.backend, "threads": info.n_threads}, sys.stdout)


def _batch(step: Step, start: int, tokens: np.ndarray) -> Batch:
    positions = np.concatenate([np.arange(start, start + n) for _, n in step]).astype(np.int32)
    sequences = np.concatenate([np.full(n, seq) for seq, n in step]).astype(np.int32)
    last = np.concatenate([np.arange(n) == n - 1 for _, n in step])
    return Batch(tokens.astype(np.int32), positions, sequences, last, rows=start > 0)


def _timed(llama: Llama, batch: Batch) -> float:
    start = time.perf_counter()
    llama.decode(batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
