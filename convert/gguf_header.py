"""The head of a GGUF file, read strictly: metadata and where each tensor lies.

`gguf.GGUFReader` makes a numpy view of every vocabulary entry (10 s and 700 MB for 262,144 tokens) and follows lengths
past the end of the file. This one reads the same in a fraction of a second, checks every length against what the file
has left, and keeps each field's bytes, so that a copy repeats them exactly.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from .errors import SourceInvalid

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_FIELDS = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_DIMENSIONS = 4

SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Field:
    """A metadata value. `raw` is its type and payload as the file has them; `value` is None for arrays of numbers."""

    raw: bytes
    value: int | float | str | list[bytes] | None

    @classmethod
    def string(cls, value: str) -> "Field":
        """A string field."""
        encoded = value.encode()
        return cls(struct.pack("<IQ", GGUFValueType.STRING, len(encoded)) + encoded, value)

    @classmethod
    def uint32(cls, value: int) -> "Field":
        """An unsigned 32-bit field."""
        return cls(struct.pack("<II", GGUFValueType.UINT32, value), value)

    @classmethod
    def float32(cls, value: float) -> "Field":
        """A 32-bit floating-point field."""
        return cls(struct.pack("<If", GGUFValueType.FLOAT32, value), value)


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
        """How many numbers it holds."""
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
        """`general.architecture`; SourceInvalid when the file does not say."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A string field; SourceInvalid when it is missing or no string."""
        field = self.fields.get(key)
        if field is None or not isinstance(field.value, str):
            raise SourceInvalid(f"{str(self.path)!r} has no text field {key!r}")
        return field.value

    def integer(self, key: str) -> int:
        """An integer field; SourceInvalid when it is missing or no integer."""
        field = self.fields.get(key)
        if field is None or not isinstance(field.value, int):
            raise SourceInvalid(f"{str(self.path)!r} has no integer field {key!r}")
        return field.value

    @cached_property
    def vocabulary(self) -> Mapping[bytes, int]:
        """Token bytes as the vocabulary spells them -> token id (the first, where one is listed twice)."""
        field = self.fields.get("tokenizer.ggml.tokens")
        tokens = field.value if field is not None and isinstance(field.value, list) else []
        return {token: index for index, token in reversed(list(enumerate(tokens)))}


def read_header(path: Path) -> Header:
    """Read and check the head of the GGUF file at `path`. Raises SourceInvalid naming the place and the value."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except OSError as error:
        raise SourceInvalid(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SourceInvalid(f"{str(path)!r} is no GGUF file: {error}") from error


class _Reader:
    """A cursor over the file that never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._take(4, "magic") != MAGIC:
            raise self._bad(f"starts with {bytes(self._data[:4])!r}, a GGUF file starts with {MAGIC!r}")
        version = self._number("I", "version")
        if version not in {2, 3}:
            raise self._bad(f"has GGUF version {version}; known are 2 and 3 (little-endian)")
        n_tensors = self._count("tensor count", MAX_TENSORS)
        n_fields = self._count("field count", MAX_FIELDS)
        fields: dict[str, Field] = {}
        for _ in range(n_fields):
            key = self._name("field name")
            if key in fields:
                raise self._bad(f"has the field {key!r} twice")
            fields[key] = self._field(key)
        alignment = self._alignment(fields)
        return Header(self._path, fields, self._tensors(n_tensors, alignment), alignment)

    def _bad(self, what: str) -> SourceInvalid:
        return SourceInvalid(f"{str(self._path)!r} {what}")

    def _skip(self, n_bytes: int, what: str) -> int:
        """Move on by `n_bytes` and return where they start."""
        start, left = self._at, len(self._data) - self._at
        if n_bytes > left:
            raise self._bad(f"is truncated or corrupt: {what} at byte {start} needs {n_bytes} bytes, {left} are left")
        self._at += n_bytes
        return start

    def _take(self, n_bytes: int, what: str) -> bytes:
        start = self._skip(n_bytes, what)
        return self._data[start : self._at]

    def _number(self, code: str, what: str) -> int:
        value: int = struct.unpack("<" + code, self._take(struct.calcsize("<" + code), what))[0]
        return value

    def _count(self, what: str, limit: int) -> int:
        count = self._number("Q", what)
        if count > limit:
            raise self._bad(f"has {what} {count}, the limit is {limit}")
        return count

    def _name(self, what: str) -> str:
        encoded = self._take(self._count(f"length of a {what}", MAX_KEY_BYTES), what)
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            raise self._bad(f"has a {what} that is not UTF-8: {encoded[:64]!r}") from None

    def _field(self, key: str) -> Field:
        start = self._at
        kind = self._number("I", f"type of {key!r}")
        value: int | float | str | list[bytes] | None
        if kind == GGUFValueType.ARRAY:
            value = self._array(key)
        elif kind == GGUFValueType.STRING:
            value = self._take(self._number("Q", f"length of {key!r}"), f"{key!r}").decode(errors="replace")
        elif kind in SCALARS:
            value = self._number(SCALARS[kind], f"{key!r}")
        else:
            raise self._bad(f"has the unknown type {kind} for {key!r}")
        return Field(self._data[start : self._at], value)

    def _array(self, key: str) -> list[bytes] | None:
        kind = self._number("I", f"element type of {key!r}")
        count = self._number("Q", f"length of {key!r}")
        if kind in SCALARS:
            self._skip(count * struct.calcsize("<" + SCALARS[kind]), f"array {key!r}")
            return None
        if kind != GGUFValueType.STRING:
            raise self._bad(f"has the array {key!r} of type {kind}; known are numbers and strings")
        if count * 8 > len(self._data) - self._at:
            raise self._bad(f"is truncated or corrupt: array {key!r} claims {count} strings")
        return [self._take(self._number("Q", key), key) for _ in range(count)]

    def _alignment(self, fields: Mapping[str, Field]) -> int:
        field = fields.get("general.alignment")
        alignment = DEFAULT_ALIGNMENT if field is None else field.value
        if not isinstance(alignment, int) or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
            raise self._bad(f"has alignment {alignment!r}; it must be a power of two between 8 and 65536")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        relative: dict[str, TensorInfo] = {}
        expected = 0
        for _ in range(count):
            tensor = self._tensor()
            if tensor.name in relative:
                raise self._bad(f"has the tensor {tensor.name!r} twice")
            if tensor.offset != expected:
                raise self._bad(f"has tensor {tensor.name!r} at offset {tensor.offset}, expected {expected}")
            relative[tensor.name] = tensor
            expected = padded(expected + tensor.n_bytes, alignment)
        start = padded(self._at, alignment)
        for tensor in relative.values():
            if start + tensor.offset + tensor.n_bytes > len(self._data):
                raise self._bad(
                    f"is truncated: tensor {tensor.name!r} ends at byte {start + tensor.offset + tensor.n_bytes}, "
                    f"the file has {len(self._data)}"
                )
        return {
            name: TensorInfo(name, tensor.shape, tensor.kind, start + tensor.offset, tensor.n_bytes)
            for name, tensor in relative.items()
        }

    def _tensor(self) -> TensorInfo:
        name = self._name("tensor name")
        n_dimensions = self._number("I", f"dimensions of {name!r}")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise self._bad(f"has tensor {name!r} with {n_dimensions} dimensions, allowed are 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._number("Q", f"shape of {name!r}") for _ in range(n_dimensions))[::-1]
        number = self._number("I", f"type of {name!r}")
        offset = self._number("Q", f"offset of {name!r}")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self._bad(f"has tensor {name!r} of unknown type {number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise self._bad(f"has tensor {name!r} of shape {shape}; rows of {kind.name} come in multiples of {block}")
        return TensorInfo(name, shape, kind, offset, prod(shape) // block * block_bytes)


def padded(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment
