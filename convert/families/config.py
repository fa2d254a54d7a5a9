"""Typed, bounded access to the values of a config.json; every error names the key and the value.

No value of a config reaches llama.cpp or decides a size before it is checked here.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from convert.errors import SourceInvalid

MAX_LAYERS = 1000
MAX_HEADS = 4096
MAX_WIDTH = 1 << 17
MAX_VOCABULARY = 1 << 20
MAX_CONTEXT = 1 << 28
_LARGEST = 1e30


class Config:
    """The values of one config.json (of its text model), with transformers' defaults for those it omits."""

    def __init__(self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path = path
        self._values = {**defaults, **values}

    def changed(self, **values: Any) -> "Config":
        """The same values, with these in place of the file's."""
        return Config(self.path, {**self._values, **values}, {})

    def get(self, key: str) -> Any:
        """The unchecked value, None if there is none."""
        return self._values.get(key)

    def integer(self, key: str, most: int, least: int = 1) -> int:
        """A whole number between `least` and `most`."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.bad(key, f"it must be a whole number between {least} and {most}")
        return value

    def number(self, key: str, least: float = 0.0) -> float:
        """A finite number, no smaller than `least`."""
        value = self.get(key)
        if not is_number(value) or value < least:
            raise self.bad(key, f"it must be a number of at least {least:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; a missing value and null are false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.bad(key, "it must be true or false")
        return bool(value)

    def require(self, key: str, allowed: Collection[Any], why: str = "") -> None:
        """Raise SourceInvalid unless the value is one of `allowed`; `why` explains the limit."""
        if self.get(key) not in allowed:
            known = ", ".join(repr(value) for value in allowed)
            raise self.bad(key, f"only {known} can be converted in this family{why and f': {why}'}")

    def bad(self, key: str, why: str) -> SourceInvalid:
        """The error for the value of `key`."""
        shown = repr(self.get(key))
        return SourceInvalid(f"{str(self.path)!r}: {key!r} is {shown[:80]}; {why}")


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine the shapes of all weights, in elements."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int

    @property
    def n_q(self) -> int:
        """The width of all queries."""
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        """The width of all keys, and of all values."""
        return self.n_head_kv * self.head_dim


def read_sizes(config: Config) -> Sizes:
    """Read the sizes and check their bounds and that they fit each other. Raises SourceInvalid naming the value."""
    n_embd = config.integer("hidden_size", MAX_WIDTH)
    n_head = config.integer("num_attention_heads", MAX_HEADS)
    n_head_kv = n_head
    if config.get("num_key_value_heads") is not None:
        n_head_kv = config.integer("num_key_value_heads", n_head)
        if n_head % n_head_kv:
            raise config.bad("num_key_value_heads", f"it must divide the {n_head} attention heads")
    if config.get("head_dim") is not None:
        head_dim = config.integer("head_dim", MAX_WIDTH // n_head)
    elif n_embd % n_head:
        raise config.bad("num_attention_heads", f"it must divide the hidden size, {n_embd}")
    else:
        head_dim = n_embd // n_head
    if head_dim % 2:
        raise config.bad("num_attention_heads", f"its heads have {head_dim} elements; rotary embeddings need pairs")
    return Sizes(
        n_layers=config.integer("num_hidden_layers", MAX_LAYERS),
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size", MAX_WIDTH),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=config.integer("vocab_size", MAX_VOCABULARY),
    )


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number that fits into a float32."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and abs(value) <= _LARGEST
