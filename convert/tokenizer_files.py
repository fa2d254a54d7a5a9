"""Reading a tokenizer's JSON files strictly: sizes are bounded, and whatever is wrong names the file."""

from pathlib import Path
from typing import Any, TypeGuard

from pydantic_core import from_json

from .errors import TokenizerInvalid

MAX_FILE_BYTES = 256 << 20
MAX_TOKENS = 1 << 21
MAX_MERGES = 1 << 22
MAX_TOKEN_BYTES = 1 << 16

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"


def read_bytes(file: Path) -> bytes:
    """The whole file. Raises TokenizerInvalid when it is too large or cannot be read."""
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise TokenizerInvalid(f"{str(file)!r} has {size} bytes, the limit is {MAX_FILE_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise TokenizerInvalid(f"{str(file)!r} cannot be read: {error.strerror or error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that `file` holds; empty when there is no such file. Raises TokenizerInvalid."""
    if not file.exists():
        return {}
    try:
        # strings that are kept for the next time would hold on to the memory of all others
        found = from_json(read_bytes(file), cache_strings="none")
    except ValueError as error:
        raise TokenizerInvalid(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerInvalid(f"{str(file)!r} holds a {type(found).__name__}, a JSON object is needed")
    return found


def part(parent: object, key: str) -> dict[str, Any]:
    """The object at `key`; empty when there is none."""
    found = parent.get(key) if isinstance(parent, dict) else None
    return found if isinstance(found, dict) else {}


def entries(parent: object, key: str) -> list[Any]:
    """The list at `key`; empty when there is none."""
    found = parent.get(key) if isinstance(parent, dict) else None
    return found if isinstance(found, list) else []


def is_id(value: object) -> TypeGuard[int]:
    """Whether `value` can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
