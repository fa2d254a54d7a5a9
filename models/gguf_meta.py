"""What a GGUF file says of itself before its tensors: enough to judge a file without loading it.

Read strictly: each length is checked against what the file has left, and long arrays are passed over and counted only.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import BadGguf

MAX_FIELDS = 65_536
# Numbers of an array that are kept: one for each layer of a model, say.
MAX_KEPT = 1024

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Value = str | int | float | tuple[int | float, ...] | None


@dataclass(frozen=True)
class GgufMeta:
    """Metadata of one file. `values` holds None for arrays of texts or of very many numbers, `lengths` all arrays'."""

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
        """The family, which begins the names of its own fields."""
        return self.text("general.architecture")

    @property
    def is_adapter(self) -> bool:
        """Whether the file is a LoRA adapter and no model."""
        return self.text("general.type") == "adapter"

    @property
    def n_vocab(self) -> int:
        """How many tokens there are; 0 when the file holds no vocabulary."""
        return self.lengths.get("tokenizer.ggml.tokens", 0)


def read_meta(path: Path) -> GgufMeta:
    """Read the metadata of the GGUF file at `path`. Raises BadGguf naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).meta()
    except OSError as error:
        raise BadGguf(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:  # a file of no bytes cannot be mapped; a short one ends too early
        raise BadGguf(f"{str(path)!r} is not a GGUF file, or a damaged one: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def meta(self) -> GgufMeta:
        if (magic := self._bytes(4)) != b"GGUF":
            raise ValueError(f"it begins with {magic!r}, expected b'GGUF'")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"GGUF version {version}; known are 2 and 3")
        self._number("Q")  # how many tensors
        if (n_fields := self._number("Q")) > MAX_FIELDS:
            raise ValueError(f"{n_fields} metadata fields, limit {MAX_FIELDS}")
        values: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(int(n_fields)):
            key = self._text()
            kind = self._number("I")
            if kind == _ARRAY:
                values[key], lengths[key] = self._array()
            else:
                values[key] = self._text() if kind == _STRING else self._number(self._format(kind))
        return GgufMeta(values, lengths)

    def _array(self) -> tuple[tuple[int | float, ...] | None, int]:
        kind, length = self._number("I"), int(self._number("Q"))
        if kind == _STRING:
            for _ in range(length):
                self._skip(int(self._number("Q")))
            return None, length
        form = self._format(kind)
        if length > MAX_KEPT:
            self._skip(length * struct.calcsize(form))
            return None, length
        return tuple(self._number(form) for _ in range(length)), length

    def _format(self, kind: int | float) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown type {kind} at byte {self._at}")
        return _SCALARS[int(kind)]

    def _number(self, form: str) -> int | float:
        (number,) = struct.unpack_from("<" + form, self._data, self._at)
        self._at += struct.calcsize(form)
        return number  # type: ignore[no-any-return]

    def _text(self) -> str:
        return self._bytes(int(self._number("Q"))).decode(errors="replace")

    def _bytes(self, length: int) -> bytes:
        start = self._at
        self._skip(length)
        return self._data[start : self._at]

    def _skip(self, length: int) -> None:
        if length > len(self._data) - self._at:
            raise ValueError(f"{length} bytes at byte {self._at}, but the file has {len(self._data)}")
        self._at += length
