"""The importance matrix: the weight of each column of a matrix, which is the mean square of its inputs on real text.

Quantizing minimises the rounding error weighted by it, so that the columns that the user's own texts use most lose
least. It is computed like llama.cpp's `llama-imatrix` (tools/imatrix/imatrix.cpp), in the same file format.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from convert.child import StepProgress, run_child
from convert.errors import ImatrixFailed, ImatrixInvalid
from convert.gguf_writer import Layout, OutTensor, write_gguf
from models.errors import BadGguf
from models.gguf.fields import Field
from models.gguf.header import DEFAULT_ALIGNMENT, Header, read_header

CHUNK_TOKENS = 512
# Its name beside the file that was quantized with it.
IMATRIX_FILE = "imatrix.gguf"
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImatrixEntry:
    """The inputs of one matrix.

    `sums` of their squares: float32 of shape (experts, n_in); a dense matrix has one row. `counts` of added inputs:
    int64 of shape (experts,).
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def importance(self) -> np.ndarray:
        """The mean square of each column, float32 of shape (experts · n_in,); 1 for an expert without inputs."""
        used = self.counts[:, None] > 0
        means = np.where(used, self.sums / np.maximum(self.counts, 1)[:, None], 1)
        return np.ascontiguousarray(means, dtype=np.float32).ravel()


@dataclass(frozen=True)
class Imatrix:
    """Tensor name -> its inputs, over `n_chunks` pieces of text of at most `chunk_tokens`."""

    entries: Mapping[str, ImatrixEntry]
    n_chunks: int
    chunk_tokens: int


def collect(
    gguf: Path,
    sequences: Sequence[Sequence[int]],
    target: Path,
    progress: StepProgress,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    output: bool = False,
) -> Imatrix:
    """Run the token ids `sequences` through the model, write the matrix to `target` and return it.

    A sequence includes its BOS, if any. A sequence longer than `chunk_tokens` continues in further chunks, each with
    BOS in place of its first token if the vocabulary adds one. `llama-imatrix -c` does the same, but drops the tail.
    `output`: collect the output matrix, too (`--process-output`), under the embedding's name where the two are tied.
    `progress` counts tokens. Raises BadGguf, and ImatrixFailed for tokens the model does not have or if the child
    fails. An interrupted or failed run leaves no `target`.
    """
    header = read_header(gguf)
    chunk_tokens = min(chunk_tokens, header.integer(f"{header.architecture}.context_length"))
    _check_tokens(header, sequences, chunk_tokens)
    job = {
        "gguf": str(gguf),
        "target": str(target),
        "sequences": [[int(token) for token in sequence] for sequence in sequences],
        "chunk_tokens": chunk_tokens,
        "output": output,
    }
    try:
        code, complaint = run_child("convert.quantize.imatrix_child", job, progress)
        if code != 0:
            raise ImatrixFailed(
                f"no importance matrix could be collected on {gguf.name!r} (exit code {code}): {complaint}"
            )
        return read_imatrix(target)
    except BaseException:
        for left in (target, target.with_name(target.name + ".partial")):
            left.unlink(missing_ok=True)
        raise


def _check_tokens(header: Header, sequences: Sequence[Sequence[int]], chunk_tokens: int) -> None:
    if chunk_tokens < 1:
        raise ImatrixFailed(f"chunks of {chunk_tokens} tokens: at least 1 is needed")
    if not any(len(sequence) for sequence in sequences):
        raise ImatrixFailed("there is no text to collect an importance matrix from")
    n_vocab = header.n_vocab
    for index, sequence in enumerate(sequences):
        if len(sequence) and not 0 <= min(sequence) <= max(sequence) < n_vocab:
            raise ImatrixFailed(
                f"text {index} has token ids {min(sequence)} … {max(sequence)}, {header.path.name!r} has "
                f"{n_vocab} tokens"
            )


def write_imatrix(target: Path, imatrix: Imatrix) -> None:
    """Write the matrix as a GGUF file, complete or not at all."""
    tensors: dict[str, np.ndarray] = {}
    for name, entry in sorted(imatrix.entries.items()):
        tensors[name + _SUMS] = entry.sums.astype("<f4")
        tensors[name + _COUNTS] = entry.counts.reshape(-1, 1).astype("<f4")
    fields = {
        "general.type": Field.string("imatrix"),
        "imatrix.datasets": Field.string_array([]),
        "imatrix.chunk_count": Field.uint32(imatrix.n_chunks),
        "imatrix.chunk_size": Field.uint32(imatrix.chunk_tokens),
    }
    layout = Layout(
        fields,
        [OutTensor(name, array.shape, GGMLQuantizationType.F32) for name, array in tensors.items()],
        DEFAULT_ALIGNMENT,
    )

    def rows(name: str) -> Iterator[np.ndarray]:
        yield tensors[name]

    write_gguf(target, layout, rows, lambda n_bytes: None)


def read_imatrix(path: Path) -> Imatrix:
    """Read a matrix, ours or llama-imatrix's. Raises ImatrixInvalid naming the file, the tensor and the fault."""
    try:
        header = read_header(path)
        n_chunks, chunk_tokens = header.integer("imatrix.chunk_count"), header.integer("imatrix.chunk_size")
    except BadGguf as error:
        raise ImatrixInvalid(f"no importance matrix: {error}") from error
    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    entries = {name: _entry(header, name) for name in names}
    if not entries:
        raise ImatrixInvalid(f"{str(path)!r} is no importance matrix: it holds no tensor ending in {_SUMS!r}")
    return Imatrix(entries, n_chunks, chunk_tokens)


def _entry(header: Header, name: str) -> ImatrixEntry:
    counts = _values(header, name + _COUNTS)
    sums = _values(header, name + _SUMS)
    if sums.size % counts.size:
        raise ImatrixInvalid(
            f"{str(header.path)!r}: {name!r} has {sums.size} sums and {counts.size} counts: no whole rows"
        )
    return ImatrixEntry(sums.reshape(counts.size, -1), np.rint(counts).astype(np.int64))


def _values(header: Header, name: str) -> np.ndarray:
    tensor = header.tensors.get(name)
    if tensor is None or tensor.kind != GGMLQuantizationType.F32:
        found = "is missing" if tensor is None else f"is {tensor.kind.name}, must be F32"
        raise ImatrixInvalid(f"{str(header.path)!r}: {name!r} {found}")
    values = np.fromfile(header.path, "<f4", tensor.n_elements, offset=tensor.offset)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ImatrixInvalid(f"{str(header.path)!r}: {name!r} holds values that are negative or not finite")
    return values
