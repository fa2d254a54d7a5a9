"""Child process that collects an importance matrix: it decodes the text and inspects each matrix multiplication.

llama.cpp calls `cb_eval` for every node of the graph, first to ask whether its result is needed and again when it is
computed. After the last needed one the computation is stopped: the output matrix is two thirds of a small model.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp

from convert.child import StepProgress, read_job, tell
from convert.errors import ImatrixFailed
from models.common.machine import physical_cores
from runtime.errors import EngineError
from runtime.llama.decode import decode_error
from runtime.llama.ggml import F32, Ggml, GgmlTensor
from runtime.llama.handle import ModelHandle

from .imatrix import Imatrix, ImatrixEntry, write_imatrix

# Rows of logits are reserved for each token of a batch, 1 MiB each with a large vocabulary.
_BATCH_TOKENS = 128
_VOCABULARY = {b"output.weight", b"token_embd.weight"}


class Collector:
    """Adds up the squares of the inputs of each matrix."""

    def __init__(self, ggml: Ggml, *, output: bool) -> None:
        """Collect nothing yet. `output`: include the output matrix, which may be the embedding."""
        self.error: Exception | None = None
        self._ggml = ggml
        self._output = output
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._looked = 0
        self._enough: int | None = None

    @property
    def entries(self) -> dict[str, ImatrixEntry]:
        """The sums and counts so far."""
        return {name: ImatrixEntry(sums.astype(np.float32), self._counts[name]) for name, sums in self._sums.items()}

    def begin(self) -> None:
        """Begin a batch. The first batch tells later ones which node is the last that is needed."""
        self._enough = self._looked or None
        self._looked = 0

    def look(self, address: int, ask: bool, _: object) -> bool:
        """Handle llama.cpp's callback. An exception cannot pass through C: it is stored, and the computation stops."""
        try:
            node = GgmlTensor.from_address(address)
            if ask:
                return self._wants(node)
            self._add(node.src[0].contents.name.decode(), node)
        except Exception as error:  # noqa: BLE001
            self.error = error
            return False
        self._looked += 1
        return self._looked != self._enough

    def _wants(self, node: GgmlTensor) -> bool:
        if node.op not in {self._ggml.mul_mat, self._ggml.mul_mat_id} or node.src[1].contents.type != F32:
            return False
        name: bytes = node.src[0].contents.name
        return name.startswith(b"blk.") or (self._output and name in _VOCABULARY)

    def _add(self, name: str, node: GgmlTensor) -> None:
        weights, inputs = node.src[0].contents, self._ggml.read(node.src[1].contents)
        squares = np.square(inputs, dtype=np.float64)
        n_matrices = weights.ne[2] * weights.ne[3]
        if node.op == self._ggml.mul_mat_id:
            counts = np.zeros(n_matrices, np.int64)
            sums = _routed(squares[0], self._ggml.read(node.src[2].contents)[0, 0], counts)
        else:
            counts = np.array([inputs.size // inputs.shape[-1] // n_matrices])
            sums = _dense(squares, (weights.ne[3], weights.ne[2]))
        if not np.isfinite(sums).all():
            raise ImatrixFailed(f"the inputs of {name!r} are not finite: the weights are damaged")
        self._sums[name] = self._sums.get(name, 0) + sums
        self._counts[name] = self._counts.get(name, 0) + counts


def _dense(squares: np.ndarray, matrices: tuple[int, int]) -> np.ndarray:
    """Sum inputs of shape (n3, n2, rows, n_in), which cycle through the `matrices`, to (matrices, n_in)."""
    sums = np.zeros((matrices[0] * matrices[1], squares.shape[-1]))
    for i3, i2 in np.ndindex(squares.shape[:2]):
        sums[(i3 % matrices[0]) * matrices[1] + i2 % matrices[1]] += squares[i3, i2].sum(axis=0)
    return sums


def _routed(squares: np.ndarray, experts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum inputs of shape (tokens, 1 or used, n_in) by the expert they went to, `experts` of shape (tokens, used)."""
    sums = np.zeros((counts.size, squares.shape[-1]))
    for used in range(experts.shape[1]):
        np.add.at(sums, experts[:, used], squares[:, used % squares.shape[1]])
        np.add.at(counts, experts[:, used], 1)
    return sums


def main() -> int:
    """Run the job. Returns 0 when the file is written."""
    job = read_job()
    try:
        collector = Collector(Ggml(llama_cpp._lib), output=job["output"])
        model = ModelHandle(Path(job["gguf"]))
        vocabulary = llama_cpp.llama_model_get_vocab(model.pointer)
        adds_bos = llama_cpp.llama_vocab_get_add_bos(vocabulary)
        bos = llama_cpp.llama_vocab_bos(vocabulary) if adds_bos else None
        chunks = list(cut(job["sequences"], job["chunk_tokens"], bos))
        _decode(model, chunks, collector, tell)
        write_imatrix(Path(job["target"]), Imatrix(collector.entries, len(chunks), job["chunk_tokens"]))
    except (EngineError, ImatrixFailed) as error:
        tell(error)
        return 1
    return 0


def cut(sequences: Sequence[Sequence[int]], size: int, bos: int | None) -> Iterator[list[int]]:
    """Cut sequences into chunks of at most `size` tokens; later chunks have `bos` in place of their first token."""
    for sequence in sequences:
        for start in range(0, len(sequence), size):
            chunk = list(sequence[start : start + size])
            if start and bos is not None:
                chunk[0] = bos
            yield chunk


def _decode(model: ModelHandle, chunks: Sequence[Sequence[int]], collector: Collector, progress: StepProgress) -> None:
    callback = llama_cpp.ggml_backend_sched_eval_callback(collector.look)
    size = max(len(chunk) for chunk in chunks)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = size
    params.n_batch = params.n_ubatch = params.n_outputs_max = min(size, _BATCH_TOKENS)
    params.n_seq_max = 1
    params.n_threads = params.n_threads_batch = physical_cores()
    params.op_offload = False  # weights copied to a device for the batch have another name
    params.cb_eval = callback
    context = model.context(params, "the importance matrix")
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    done, total = 0, sum(len(chunk) for chunk in chunks)
    for chunk in chunks:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        for start in range(0, len(chunk), params.n_batch):
            tokens = chunk[start : start + params.n_batch]
            _fill(batch, tokens, start)
            collector.begin()
            code = llama_cpp.llama_decode(context, batch)
            if collector.error is not None:
                raise collector.error
            if code != 0:
                raise decode_error(code, len(tokens))
            done += len(tokens)
            progress(done, total)


def _fill(batch: llama_cpp.llama_batch, tokens: Sequence[int], first_position: int) -> None:
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, first_position + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = True  # the last layer computes only the requested rows


if __name__ == "__main__":
    sys.exit(main())
