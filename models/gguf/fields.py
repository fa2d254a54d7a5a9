"""The fields (metadata) of a GGUF file, read strictly: hostile lengths are refused, long arrays are skipped.

`gguf.GGUFReader` makes a numpy view of every vocabulary entry (10 s and 700 MB for 262,144 tokens) and follows lengths
past the end of the file. Here each length is checked against what the file has left, and a field keeps its bytes: a
copy repeats them exactly, and a value is decoded only on access.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.errors import BadGguf

MAGIC = b"GGUF"
MAX_FIELDS = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
# Limit of the part before the weights, which is held in memory: ten times the largest vocabulary.
MAX_HEAD_BYTES = 1 << 28
TOKENS = "tokenizer.ggml.tokens"

_UINT8, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 0, 4, 5, 6, 7, 8, 9
# The other types by their number in the file: u8 i8 u16 i16 u32 i32 f32 bool, then u64 i64 f64.
_SCALARS: Mapping[int, struct.Struct] = {
    kind: struct.Struct("<" + code)
    for kind, code in zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True)
}
_LENGTH = struct.Struct("<Q")
_LENGTH_BYTES = _LENGTH.size
_ARRAY_HEAD = struct.Struct("<IIQ")

# Ending of a field's name, after the architecture's prefix -> least and largest permitted value.
_LIMITS: Mapping[str, tuple[int, int]] = {
    "block_count": (1, 512),
    "attention.head_count": (0, 1 << 14),
    "attention.head_count_kv": (0, 1 << 14),
    "attention.key_length": (0, 1 << 14),
    "attention.value_length": (0, 1 << 14),
}
# Limit of every count in a model: tokens, positions, widths.
_MOST = 1 << 30
_SMALLEST = ("_epsilon",)
# Gemma 3n marks the layers without sparsity so.
_MAY_BE_ENDLESS = frozenset({"activation_sparsity_scale"})


@dataclass(frozen=True)
class Field:
    """A metadata value: its type and payload as in the file, complete."""

    raw: bytes

    @classmethod
    def string(cls, value: str) -> "Field":
        """A string field."""
        encoded = value.encode()
        return cls(struct.pack("<IQ", _STRING, len(encoded)) + encoded)

    @classmethod
    def uint32(cls, value: int) -> "Field":
        """An unsigned 32-bit field."""
        return cls(struct.pack("<II", _UINT32, value))

    @classmethod
    def int32(cls, value: int) -> "Field":
        """A signed 32-bit field."""
        return cls(struct.pack("<Ii", _INT32, value))

    @classmethod
    def float32(cls, value: float) -> "Field":
        """A 32-bit floating-point field."""
        return cls(struct.pack("<If", _FLOAT32, value))

    @classmethod
    def boolean(cls, value: bool) -> "Field":
        """A truth value."""
        return cls(struct.pack("<I?", _BOOL, value))

    @classmethod
    def string_array(cls, values: Sequence[bytes]) -> "Field":
        """An array of strings, which need not be UTF-8."""
        head = _ARRAY_HEAD.pack(_ARRAY, _STRING, len(values))
        return cls(head + b"".join(_LENGTH.pack(len(value)) + value for value in values))

    @classmethod
    def float32_array(cls, values: Sequence[float]) -> "Field":
        """An array of 32-bit floating-point numbers."""
        return cls(_ARRAY_HEAD.pack(_ARRAY, _FLOAT32, len(values)) + struct.pack(f"<{len(values)}f", *values))

    @classmethod
    def uint8_array(cls, values: bytes) -> "Field":
        """An array of bytes."""
        return cls(_ARRAY_HEAD.pack(_ARRAY, _UINT8, len(values)) + values)

    @classmethod
    def int32_array(cls, values: Sequence[int]) -> "Field":
        """An array of signed 32-bit numbers."""
        return cls(_ARRAY_HEAD.pack(_ARRAY, _INT32, len(values)) + struct.pack(f"<{len(values)}i", *values))

    @classmethod
    def boolean_array(cls, values: Sequence[bool]) -> "Field":
        """An array of truth values."""
        return cls(_ARRAY_HEAD.pack(_ARRAY, _BOOL, len(values)) + struct.pack(f"<{len(values)}?", *values))

    @property
    def value(self) -> int | float | str | None:
        """The number or the text; None for an array."""
        kind = self._kind
        if kind == _STRING:
            return self.raw[4 + _LENGTH.size :].decode(errors="replace")
        if kind == _ARRAY:
            return None
        number: int | float = _SCALARS[kind].unpack_from(self.raw, 4)[0]
        return number

    @property
    def length(self) -> int | None:
        """Length of an array; None for anything else."""
        return int(_ARRAY_HEAD.unpack_from(self.raw)[2]) if self._kind == _ARRAY else None

    @property
    def numbers(self) -> tuple[int | float, ...] | None:
        """The elements of an array of numbers; None for anything else."""
        kind, length = self._elements
        if kind is None or kind not in _SCALARS:
            return None
        return struct.unpack_from(f"<{length}{_SCALARS[kind].format[1:]}", self.raw, _ARRAY_HEAD.size)

    @property
    def strings(self) -> list[bytes] | None:
        """The elements of an array of strings, which need not be UTF-8; None for anything else."""
        return list(self._each_string()) if self._elements[0] == _STRING else None

    def strings_at(self, places: Iterable[int]) -> dict[int, bytes]:
        """The elements of an array of strings at `places`, in ascending order; the others are passed over.

        Raises IndexError for a place that the array has not, and for any if it is not an array of strings.
        """
        length = self._elements[1] if self._elements[0] == _STRING else 0
        at, raw, length_at = _ARRAY_HEAD.size, self.raw, _LENGTH.unpack_from
        found: dict[int, bytes] = {}
        passed = 0
        for place in sorted(set(places)):
            if not 0 <= place < length:
                raise IndexError(f"string {place} of {length}")
            for _ in range(place - passed):  # of a vocabulary, hundreds of thousands
                at += _LENGTH_BYTES + length_at(raw, at)[0]
            start = at + _LENGTH_BYTES
            at = start + length_at(raw, at)[0]
            found[place], passed = raw[start:at], place + 1
        return found

    def find(self, text: bytes) -> int | None:
        """The index of the first string of the array that equals `text`; None without a match, and for other fields."""
        if self._elements[0] != _STRING or _LENGTH.pack(len(text)) + text not in self.raw:
            return None
        return next((place for place, string in enumerate(self._each_string()) if string == text), None)

    def _each_string(self) -> Iterator[bytes]:
        at, raw, length_at = _ARRAY_HEAD.size, self.raw, _LENGTH.unpack_from
        for _ in range(self._elements[1]):  # of a vocabulary, hundreds of thousands
            start = at + _LENGTH_BYTES
            at = start + length_at(raw, at)[0]
            yield raw[start:at]

    @property
    def _kind(self) -> int:
        return int.from_bytes(self.raw[:4], "little")

    @property
    def _elements(self) -> tuple[int | None, int]:
        """Element type and length of an array; None and 0 for anything else."""
        if self._kind != _ARRAY:
            return None, 0
        _, kind, length = _ARRAY_HEAD.unpack_from(self.raw)
        return kind, length


def read_fields(path: Path) -> dict[str, Field]:
    """Read the fields of the GGUF file at `path`, in its order. Raises BadGguf naming the place and the value."""
    with open_head(path) as head:
        return head.fields()[0]


def check_fields(path: Path, fields: Mapping[str, Field]) -> None:
    """Raise BadGguf for a size out of range, naming the field, the limit and the value."""
    named = fields.get("general.architecture")
    prefix = f"{named.value}." if named is not None else None
    for key, field in fields.items():
        if prefix is not None and key.startswith(prefix):
            for value in _numbers(field):
                _check(path, key, key.removeprefix(prefix), value)


def check_vocabulary(path: Path, fields: Mapping[str, Field]) -> None:
    """Raise BadGguf for a token that is listed twice: llama.cpp aborts on an assertion."""
    field = fields.get(TOKENS)
    tokens = (field.strings if field is not None else None) or []
    if b"\0" in b"".join(tokens):  # to llama.cpp a token ends there
        tokens = [token.split(b"\0", 1)[0] for token in tokens]
    if b"" in tokens:  # and each empty one gets a name of its own
        tokens = [token or b"[EMPTY_%d]" % index for index, token in enumerate(tokens)]
    if len(set(tokens)) == len(tokens):
        return
    twice = next(token for token, count in Counter(tokens).items() if count > 1)
    places = [index for index, token in enumerate(tokens) if token == twice][:2]
    raise BadGguf(f"{str(path)!r} has the token {twice[:64]!r} twice: as {places[0]} and as {places[1]}")


@contextmanager
def open_head(path: Path) -> Iterator["HeadReader"]:
    """Open the file at `path` for reading from its beginning. Raises BadGguf if it cannot be opened."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield HeadReader(path, data)
    except OSError as error:
        raise BadGguf(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a file of no bytes cannot be mapped
        raise BadGguf(f"{str(path)!r} is no GGUF file: {error}") from error


class HeadReader:
    """A cursor over the file that never reads past its end. Every fault raises BadGguf."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.at = 0
        self._data = data

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return len(self._data)

    def fields(self) -> tuple[dict[str, Field], int]:
        """All fields, and the number of tensors that follow them."""
        if self._take(4, "magic") != MAGIC:
            raise self.bad(f"starts with {self._data[:4]!r}, a GGUF file starts with {MAGIC!r}")
        version = self.uint32("version")
        if version not in {2, 3}:
            raise self.bad(f"has GGUF version {version}; known are 2 and 3 (little-endian)")
        n_tensors = self._count("tensor count", MAX_TENSORS)
        fields: dict[str, Field] = {}
        for _ in range(self._count("field count", MAX_FIELDS)):
            key = self.name("field name")
            if key in fields:
                raise self.bad(f"has the field {key!r} twice")
            fields[key] = self._field(key)
        return fields, n_tensors

    def bad(self, what: str) -> BadGguf:
        """An error about this file; `what` continues its name."""
        return BadGguf(f"{str(self.path)!r} {what}")

    def uint32(self, what: str) -> int:
        """The next four bytes as a number."""
        return int.from_bytes(self._take(4, what), "little")

    def uint64(self, what: str) -> int:
        """The next eight bytes as a number."""
        return int.from_bytes(self._take(8, what), "little")

    def name(self, what: str) -> str:
        """The next string, which names a field or a tensor."""
        encoded = self._take(self._count(f"length of a {what}", MAX_KEY_BYTES), what)
        try:
            return encoded.decode()
        except UnicodeDecodeError:
            raise self.bad(f"has a {what} that is not UTF-8: {encoded[:64]!r}") from None

    def _count(self, what: str, limit: int) -> int:
        count = self.uint64(what)
        if count > limit:
            raise self.bad(f"has {what} {count}, the limit is {limit}")
        return count

    def _take(self, n_bytes: int, what: str) -> bytes:
        start = self.at
        self._skip(n_bytes, what)
        return self._data[start : self.at]

    def _skip(self, n_bytes: int, what: str) -> None:
        left = self.size - self.at
        if n_bytes > left:
            raise self.bad(f"is truncated or corrupt: {what} at byte {self.at} needs {n_bytes} bytes, {left} are left")
        if self.at + n_bytes > MAX_HEAD_BYTES:
            raise self.bad(f"has {n_bytes} bytes of {what} at byte {self.at}; the head's limit is {MAX_HEAD_BYTES}")
        self.at += n_bytes

    def _field(self, key: str) -> Field:
        start = self.at
        kind = self.uint32(f"type of {key!r}")
        if kind == _ARRAY:
            self._skip_array(key)
        elif kind == _STRING:
            self._skip(self.uint64(f"length of {key!r}"), repr(key))
        elif kind in _SCALARS:
            self._skip(_SCALARS[kind].size, repr(key))
        else:
            raise self.bad(f"has the unknown type {kind} for {key!r}")
        return Field(self._data[start : self.at])

    def _skip_array(self, key: str) -> None:
        kind = self.uint32(f"element type of {key!r}")
        count = self.uint64(f"length of {key!r}")
        if kind in _SCALARS:
            self._skip(count * _SCALARS[kind].size, f"array {key!r}")
        elif kind == _STRING:
            self._skip_strings(key, count)
        else:
            raise self.bad(f"has the array {key!r} of type {kind}; known are numbers and strings")

    def _skip_strings(self, key: str, count: int) -> None:
        at, last, length_at, data = self.at, self.size - _LENGTH.size, _LENGTH.unpack_from, self._data
        if count * _LENGTH.size > self.size - at:
            raise self.bad(f"is truncated or corrupt: array {key!r} claims {count} strings")
        if count * _LENGTH.size > MAX_HEAD_BYTES:
            raise self.bad(f"has {count} strings in array {key!r}; the head's limit is {MAX_HEAD_BYTES} bytes")
        for index in range(count):  # of a vocabulary, hundreds of thousands
            if at > last:
                raise self.bad(f"is truncated or corrupt: string {index} of {count} in array {key!r} is past its end")
            at += _LENGTH.size + length_at(data, at)[0]
        self._skip(at - self.at, f"array {key!r}")


def _numbers(field: Field) -> Iterable[int | float]:
    value = field.value
    if isinstance(value, int | float):
        return (value,)
    return field.numbers or ()


def _check(path: Path, key: str, name: str, value: int | float) -> None:
    least, most = _LIMITS.get(name, (-_MOST, _MOST))
    if isinstance(value, float):
        if value == -math.inf and name in _MAY_BE_ENDLESS:
            return
        if not math.isfinite(value) or (value < 0 and name.endswith(_SMALLEST)):
            raise BadGguf(f"{str(path)!r} has {key!r} = {value}; it must be finite, and an epsilon not negative")
    elif not least <= value <= most:
        raise BadGguf(f"{str(path)!r} has {key!r} = {value}; allowed are {least} to {most}")
