"""What a conversion reads from, whatever it is on disk: a head in GGUF's terms, and weights that come in slabs.

A GGUF file and a Hugging Face folder look alike from here on, and so does either with its vocabulary trimmed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from models.gguf.header import Header, TensorInfo

from .checkpoint import Checkpoint
from .errors import SourceInvalid
from .hf_folder import HfFolder
from .tokenizer import read_vocabulary

_PARTS_OF_A_FOLDER = (".safetensors", ".json", ".bin", ".pt", ".pth")


class Source(Protocol):
    """A checkpoint to convert. Close it when done."""

    @property
    def header(self) -> Header:
        """Its fields and tensors under their GGUF names. Only the source itself reads the tensors' `offset`."""

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)) until the tensor is read; 3-d tensors are flattened.

        The rows are in the GGUF's order and form (permuted, norms + 1 …). Raises SourceInvalid when a value is not
        finite, or when the data cannot be read.
        """

    def close(self) -> None:
        """Let go of its files."""


def open_source(path: Path) -> Source:
    """Open a GGUF file, or a Hugging Face folder with its tokenizer.

    Raises BadGguf, SourceInvalid, ArchitectureUnknown or TokenizerInvalid naming the file and what is wrong with it.
    """
    if path.is_dir():
        return HfFolder(path, read_vocabulary)
    if path.suffix in _PARTS_OF_A_FOLDER:
        raise SourceInvalid(f"{str(path)!r} is one file of a checkpoint: give the folder with its config.json")
    return Checkpoint(path)
