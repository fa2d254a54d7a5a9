"""What llama.cpp takes on trust: values at which it ends the process, instead of telling what is wrong with the file.

Found by changing bytes of small models and loading what the strict reader let through. Everything else that does not
make sense it refuses by itself, with a word, and is left to it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import BadGguf
from .gguf_fields import Field

# Ending of a field's name below its architecture's -> the least and the most it may be.
_LIMITS: Mapping[str, tuple[int, int]] = {
    "block_count": (1, 512),
    "attention.head_count": (0, 1 << 14),
    "attention.head_count_kv": (0, 1 << 14),
    "attention.key_length": (0, 1 << 14),
    "attention.value_length": (0, 1 << 14),
}
# Nothing that is counted in a model is more: tokens, positions, widths.
_MOST = 1 << 30
_SMALLEST = ("_epsilon",)
_TOKENS = "tokenizer.ggml.tokens"


def check_fields(path: Path, fields: Mapping[str, Field]) -> None:
    """Raise BadGguf for a size of the model that cannot be, naming the field, the limit and the value."""
    named = fields.get("general.architecture")
    prefix = f"{named.value}." if named is not None else None
    for key, field in fields.items():
        if prefix is not None and key.startswith(prefix):
            for value in _numbers(field):
                _check(path, key, key.removeprefix(prefix), value)


def _numbers(field: Field) -> Iterable[int | float]:
    value = field.value
    if isinstance(value, int | float):
        return (value,)
    return field.numbers or ()


def _check(path: Path, key: str, name: str, value: int | float) -> None:
    least, most = _LIMITS.get(name, (-_MOST, _MOST))
    if isinstance(value, float):
        if not math.isfinite(value) or (value < 0 and name.endswith(_SMALLEST)):
            raise BadGguf(f"{str(path)!r} has {key!r} = {value}; it must be finite, and an epsilon not negative")
    elif not least <= value <= most:
        raise BadGguf(f"{str(path)!r} has {key!r} = {value}; allowed are {least} to {most}")


def check_vocabulary(path: Path, fields: Mapping[str, Field]) -> None:
    """Raise BadGguf for a token that is listed twice, which llama.cpp asserts not to be."""
    field = fields.get(_TOKENS)
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
