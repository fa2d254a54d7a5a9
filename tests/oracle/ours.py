"""Convert a folder as Deskside's pipeline does, and read a GGUF file, to compare both sides."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from gguf.constants import GGMLQuantizationType

from convert.checkpoint.source import Checkpoint, open_checkpoint
from convert.gguf_writer import Layout, OutTensor, write_gguf
from convert.planning.plan import file_rows, half_precision_kind
from models.gguf.fields import Field
from models.gguf.header import TensorInfo, read_header

Kind = Literal["f16", "f32"]
_FILE_TYPES = {"f32": 0, "f16": 1}


def to_gguf(folder: Path, target: Path, kind: Kind) -> Path:
    """Convert the folder to a GGUF file in half or full precision."""
    return write(open_checkpoint(folder), target, kind)


def write(source: Checkpoint, target: Path, kind: Kind) -> Path:
    """Write the source as a GGUF file, and close it."""
    try:
        header = source.header
        kinds = {name: _written(tensor, kind) for name, tensor in header.tensors.items()}
        tensors = [OutTensor(info.name, info.shape, kinds[info.name]) for info in header.tensors.values()]
        fields = {**header.fields, "general.file_type": Field.uint32(_FILE_TYPES[kind])}

        def rows(name: str) -> Iterator[np.ndarray]:
            return file_rows(source, header.tensors[name], kinds[name])

        write_gguf(target, Layout(fields, tensors, header.alignment), rows, lambda _: None)
    finally:
        source.close()
    return target


def _written(tensor: TensorInfo, kind: Kind) -> GGMLQuantizationType:
    return half_precision_kind(tensor) if kind == "f16" else GGMLQuantizationType.F32


def read_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensor name -> its type, shape and bytes."""
    data = path.read_bytes()
    return {
        name: (info.kind.name, info.shape, data[info.offset : info.offset + info.n_bytes])
        for name, info in read_header(path).tensors.items()
    }


def spelled(fields: Mapping[str, Field], key: str) -> object:
    """A field's value as a person reads it, for a failing test's message; None where it is missing."""
    field = fields.get(key)
    if field is None:
        return None
    return field.value if field.length is None else field.numbers or [text.decode() for text in field.strings or []]
