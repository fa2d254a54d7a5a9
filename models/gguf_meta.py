"""What serving asks of a GGUF file before it is loaded: is it an adapter, how much memory will it need, which template.

Lenient where `Header` is strict: a damaged file is refused, but one that does not say may still be served. Only small
values are kept, for as long as a model is known: the vocabulary alone would be megabytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .gguf_check import check_fields
from .gguf_fields import Field, read_fields

# Numbers of an array that are kept: one for each layer of a model, say.
MAX_KEPT = 1024

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
    """Read the metadata of the GGUF file at `path`. Raises BadGguf naming the place and the value."""
    fields = read_fields(path)
    check_fields(path, fields)
    lengths = {key: field.length for key, field in fields.items() if field.length is not None}
    return GgufMeta({key: _kept(field) for key, field in fields.items()}, lengths)


def _kept(field: Field) -> Value:
    if field.length is None:
        return field.value
    return field.numbers if field.length <= MAX_KEPT else None
