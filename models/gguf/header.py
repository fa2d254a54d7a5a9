"""The head of a GGUF file, read strictly: its fields, and where each tensor lies.

Two views: `Header` for conversion, with every field and tensor, and `GgufMeta` for serving, which is small enough to
keep and answers with a default where a field is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from models.errors import BadGguf

from .fields import MAGIC, TOKENS, Field, HeadReader, check_fields, check_vocabulary, open_head, read_fields

DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# The longest array of numbers that GgufMeta keeps: one for each layer of a model, say.
MAX_KEPT = 1024

Value = str | int | float | tuple[int | float, ...] | None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file, `offset` bytes from its start. `shape` is numpy's order, rows first: (…, n_out, n_in)."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything of a GGUF file but the weights."""

    path: Path
    fields: Mapping[str, Field]
    tensors: Mapping[str, TensorInfo]
    alignment: int

    @property
    def architecture(self) -> str:
        """`general.architecture`; BadGguf when the file does not say."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A string field; BadGguf when it is missing or no string."""
        field = self.fields.get(key)
        if field is None or not isinstance(field.value, str):
            raise BadGguf(f"{str(self.path)!r} has no text field {key!r}")
        return field.value

    def integer(self, key: str) -> int:
        """An integer field; BadGguf when it is missing or no integer."""
        field = self.fields.get(key)
        if field is None or not isinstance(field.value, int):
            raise BadGguf(f"{str(self.path)!r} has no integer field {key!r}")
        return field.value

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary; 0 without one."""
        field = self.fields.get(TOKENS)
        return (field.length or 0) if field is not None else 0

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled `text` (the first, if it is listed twice); None without one."""
        field = self.fields.get(TOKENS)
        return field.find(text.encode()) if field is not None else None


@dataclass(frozen=True)
class GgufMeta:
    """A file's metadata. `values` holds None for arrays of texts or of very many numbers, `lengths` all arrays'."""

    values: Mapping[str, Value]
    lengths: Mapping[str, int]

    def text(self, key: str) -> str:
        """A text; empty when the file does not say."""
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def numbers(self, key: str, count: int) -> tuple[int, ...]:
        """`count` whole numbers: one for each layer, or the same for all. Zeros when the file does not say."""
        value = self.values.get(key)
        many = value if isinstance(value, tuple) else (value,) * count
        return tuple(int(one) if isinstance(one, int | float) else 0 for one in many[:count])

    def number(self, key: str) -> int:
        """A whole number; 0 when the file does not say."""
        return max(self.numbers(key, 1), default=0)

    @property
    def architecture(self) -> str:
        """`general.architecture`, the prefix of the family's own fields; empty when the file does not say."""
        return self.text("general.architecture")

    @property
    def is_adapter(self) -> bool:
        """True for a LoRA adapter, False for a model."""
        return self.text("general.type") == "adapter"

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary; 0 without one."""
        return self.lengths.get(TOKENS, 0)


def is_gguf(path: Path) -> bool:
    """True if the file at `path` begins as GGUF files do, under any name; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Read and check the head of the GGUF file at `path`. Raises BadGguf naming the place and the value."""
    with open_head(path) as head:
        fields, n_tensors = head.fields()
        check_fields(path, fields)
        check_vocabulary(path, fields)
        alignment = _alignment(head, fields)
        return Header(path, fields, _tensors(head, n_tensors, alignment), alignment)


def read_tensors(path: Path) -> tuple[Mapping[str, Field], Mapping[str, TensorInfo]]:
    """The fields, not checked, and the tensors of the GGUF file at `path`. Raises BadGguf."""
    with open_head(path) as head:
        fields, n_tensors = head.fields()
        return fields, _tensors(head, n_tensors, _alignment(head, fields))


def read_meta(path: Path) -> GgufMeta:
    """Read the metadata of the GGUF file at `path`. Raises BadGguf naming the place and the value."""
    fields = read_fields(path)
    check_fields(path, fields)
    lengths = {key: field.length for key, field in fields.items() if field.length is not None}
    return GgufMeta({key: _kept(field) for key, field in fields.items()}, lengths)


def padded(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def _alignment(head: HeadReader, fields: Mapping[str, Field]) -> int:
    field = fields.get("general.alignment")
    alignment = DEFAULT_ALIGNMENT if field is None else field.value
    if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
        raise head.bad(f"has alignment {alignment!r}; it must be a power of two between 8 and 65536")
    return alignment


def _tensors(head: HeadReader, count: int, alignment: int) -> dict[str, TensorInfo]:
    relative: dict[str, TensorInfo] = {}
    expected = 0
    for _ in range(count):
        tensor = _tensor(head)
        if tensor.name in relative:
            raise head.bad(f"has the tensor {tensor.name!r} twice")
        if tensor.offset != expected:
            raise head.bad(f"has tensor {tensor.name!r} at offset {tensor.offset}, expected {expected}")
        relative[tensor.name] = tensor
        expected = padded(expected + tensor.n_bytes, alignment)
    start = padded(head.at, alignment)
    for tensor in relative.values():
        if start + tensor.offset + tensor.n_bytes > head.size:
            raise head.bad(
                f"is truncated: tensor {tensor.name!r} ends at byte {start + tensor.offset + tensor.n_bytes}, "
                f"the file has {head.size}"
            )
    return {
        name: TensorInfo(name, tensor.shape, tensor.kind, start + tensor.offset, tensor.n_bytes)
        for name, tensor in relative.items()
    }


def _tensor(head: HeadReader) -> TensorInfo:
    name = head.name("tensor name")
    n_dimensions = head.uint32(f"dimensions of {name!r}")
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise head.bad(f"has tensor {name!r} with {n_dimensions} dimensions, allowed are 1 to {MAX_DIMENSIONS}")
    shape = tuple(head.uint64(f"shape of {name!r}") for _ in range(n_dimensions))[::-1]
    number = head.uint32(f"type of {name!r}")
    offset = head.uint64(f"offset of {name!r}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise head.bad(f"has tensor {name!r} of unknown type {number}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise head.bad(f"has tensor {name!r} of shape {shape}; rows of {kind.name} come in multiples of {block}")
    return TensorInfo(name, shape, kind, offset, prod(shape) // block * block_bytes)


def _kept(field: Field) -> Value:
    if field.length is None:
        return field.value
    return field.numbers if field.length <= MAX_KEPT else None


def has_chat_template(path: Path) -> bool:
    """True if the file has a chat template. So it is taken to have if it cannot be read: that is said elsewhere."""
    try:
        return bool(read_meta(path).text("tokenizer.chat_template"))
    except BadGguf:
        return True
