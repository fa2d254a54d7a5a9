"""Times prompts in ik_llama.cpp, which has no server of its own here: a job as JSON on stdin, seconds on stdout.

Run by the peers' Python; the job and its answer are those of benchmarks/prefill/race_child.py. Weights are repacked at
load. Flash attention is off: with it, this version aborts on the heads of Gemma 3.
"""

import json
import sys
import time
from typing import Any

import ik_llama_cpp._ctypes_api as ik
import numpy as np

ENGINE = "ik_llama.cpp"
SEQUENCES = 16


class IkModel:
    """A model and its context, for steps of at most `cells` tokens. Raises ValueError when it does not load."""

    def __init__(self, gguf: str, threads: int, cells: int) -> None:
        ik.llama_backend_init()
        params = ik.llama_model_default_params()
        params.n_gpu_layers = 0
        params.repack_tensors = True
        params.flash_attn = False
        model = ik.llama_model_load_from_file(gguf.encode(), params)
        if not model:
            raise ValueError(f"ik_llama.cpp cannot load {gguf!r}")
        self.n_vocab = int(ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(model)))
        shape = ik.llama_context_default_params()
        shape.n_ctx, shape.n_batch, shape.n_ubatch, shape.n_seq_max = 2 * cells, cells, cells, SEQUENCES
        shape.n_threads = shape.n_threads_batch = threads
        shape.flash_attn = False
        self._context = ik.llama_init_from_model(model, shape)
        if not self._context:
            raise ValueError(f"ik_llama.cpp makes no context for {gguf!r}")
        self._batch = ik.llama_batch_init(cells, 0, 1)

    def timed(self, step: list[list[int]], tokens: list[int]) -> float:
        """Seconds for all parts of the step, (sequence, tokens) each, with the logits of each part's last token."""
        ik.llama_kv_cache_clear(self._context)
        batch, row = self._batch, 0
        batch.n_tokens = len(tokens)
        for sequence, length in step:
            for position in range(length):
                batch.token[row], batch.pos[row] = tokens[row], position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = position == length - 1
                row += 1
        began = time.perf_counter()
        if code := ik.llama_decode(self._context, batch):
            raise ValueError(f"ik_llama.cpp's llama_decode failed with code {code}")
        ik.llama_get_logits_ith(self._context, row - 1)
        return time.perf_counter() - began


def main() -> None:
    """Compute each step of the job `repetitions` times after one that does not count."""
    job: dict[str, Any] = json.load(sys.stdin)
    steps: dict[str, list[list[int]]] = job["steps"]
    model = IkModel(job["gguf"], job["threads"], max(sum(n for _, n in step) for step in steps.values()))
    rng = np.random.default_rng(0)
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, step in steps.items():
        took = [
            model.timed(step, rng.integers(0, model.n_vocab, sum(n for _, n in step)).tolist())
            for _ in range(job["repetitions"] + 1)
        ]
        seconds[name] = {ENGINE: took[1:]}
    json.dump({"seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main()
