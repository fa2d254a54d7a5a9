"""The engine beside a bare `llama_decode` loop with the same batches, in a process of its own.

    python -m benchmarks.peers.scripts.bare_loop MODEL_FOLDER THREADS REPETITIONS < work.json

`work.json` maps a task to {"texts": […], "tokens": n, "stops": bool}. The engine answers each task's texts, 16 at a
time; every decoded batch and every edit of the KV cache is recorded. Then the same calls are replayed without planning,
sampling or detokenizing. The difference in time is the engine's own work. Nothing here goes over HTTP, so this is the
only file of the benchmarks that imports the runtime. It prints one line of JSON per task.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import read_manifest
from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.llama.interface import Batch, LlamaLike
from runtime.llama.model import load
from runtime.requests import Finished, Request, SamplingParams
from runtime.serving.model import recipe_of
from runtime.serving.recipe import LlamaRecipe

CLIENTS = 16


class RecordingLlama:
    """A `LlamaLike` that forwards every call and records those that change the model's state."""

    def __init__(self, llama: LlamaLike) -> None:
        self._llama = llama
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.info, self.tokenizer = llama.info, llama.tokenizer

    def decode(self, batch: Batch) -> np.ndarray:
        """Compute `batch`."""
        return self._keep(self._llama.decode, batch)  # type: ignore[no-any-return]

    def embed(self, batch: Batch, adapter: str | None = None) -> np.ndarray:
        """Compute `batch` beside the cache."""
        return self._keep(self._llama.embed, batch, adapter)  # type: ignore[no-any-return]

    def use_adapter(self, name: str | None) -> None:
        """Apply an adapter."""
        self._keep(self._llama.use_adapter, name)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Share cells."""
        self._keep(self._llama.copy_prefix, source, target, length)

    def remove(self, seq_id: int, start: int = 0, end: int = -1) -> None:
        """Free cells."""
        self._keep(self._llama.remove, seq_id, start, end)

    def is_whole(self, seq_id: int, length: int) -> bool:
        """Look at the cells."""
        return self._llama.is_whole(seq_id, length)

    def save(self, seq_id: int) -> np.ndarray:
        """Take a snapshot."""
        return self._keep(self._llama.save, seq_id)  # type: ignore[no-any-return]

    def restore(self, seq_id: int, data: np.ndarray, length: int) -> bool:
        """Restore a snapshot."""
        return self._keep(self._llama.restore, seq_id, data, length)  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Empty the cache."""
        self._keep(self._llama.clear)

    def close(self) -> None:
        """Do nothing: the model outlives its engines here."""

    def replay(self) -> None:
        """Repeat every recorded call."""
        for call, arguments in self.calls:
            call(*arguments)

    def _keep(self, call: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append((call, arguments))
        return call(*arguments)


def compare(
    llama: LlamaLike, options: EngineOptions, requests: Sequence[Request], n_repetitions: int
) -> dict[str, Any]:
    """Answer `requests` with an engine, then replay its calls; seconds of each, by repetition."""
    engine_s, bare_s = [], []
    n_tokens = n_decodes = 0
    for _ in range(n_repetitions):
        llama.clear()
        recording = RecordingLlama(llama)
        engine = Engine(recording, options)
        began = time.perf_counter()
        n_tokens = sum(_answered(engine, requests))
        engine_s.append(time.perf_counter() - began)
        n_decodes = sum(call == llama.decode for call, _ in recording.calls)
        llama.clear()
        began = time.perf_counter()
        recording.replay()
        bare_s.append(time.perf_counter() - began)
        engine.close()
    return {"tokens": n_tokens, "decodes": n_decodes, "engine_s": engine_s, "bare_s": bare_s}


def _answered(engine: Engine, requests: Sequence[Request]) -> Iterator[int]:
    """Keep 16 requests running; yields the computed prompt and answer tokens of each."""
    waiting = list(reversed(requests))
    n_live = 0
    while waiting or n_live:
        while waiting and n_live < CLIENTS:
            engine.add(waiting.pop())
            n_live += 1
        for event in engine.step():
            if isinstance(event, Finished):
                n_live -= 1
                used = event.usage
                yield used.prompt_tokens - used.cached_tokens + used.completion_tokens


def main() -> None:
    """Read the work and print one line per task."""
    folder, threads, n_repetitions = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    manifest = read_manifest(folder)
    stored = StoredModel(manifest.name, folder, manifest, folder / manifest.artefacts[0].file)
    recipe = recipe_of(stored, RuntimeConfig(threads=threads), {})
    assert isinstance(recipe, LlamaRecipe)
    llama = load(recipe.gguf, recipe.load)
    for task, work in json.load(sys.stdin).items():
        params = SamplingParams(max_tokens=work["tokens"], temperature=0.0, ignore_eos=not work["stops"])
        prompts = [tuple(llama.tokenizer.encode(t, add_special=True, parse_special=True)) for t in work["texts"]]
        requests = [Request(str(number), prompt, params) for number, prompt in enumerate(prompts)]
        compare(llama, recipe.engine, requests[:CLIENTS], 1)  # warm
        print(json.dumps({"task": task} | compare(llama, recipe.engine, requests, n_repetitions)), flush=True)
    llama.close()


if __name__ == "__main__":
    main()
