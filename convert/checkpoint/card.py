"""The `general.*` fields of a GGUF (authorship, sampling defaults), from a folder's model card and configs.

The rules that split a model's name into parts are llama.cpp's, from the `gguf` library.
"""

from pathlib import Path
from typing import Any

import yaml
from gguf import GGUFWriter, size_label
from gguf.constants import GGUFValueType
from gguf.metadata import Metadata

from convert.errors import SourceInvalid
from models.gguf.fields import Field

from .config import read_json

CARD_FILE = "README.md"
GENERATION_FILE = "generation_config.json"
MAX_CARD_BYTES = 1 << 20
# The library's errors on unexpected cards.
_UNUSABLE = (SourceInvalid, yaml.YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


def general_fields(folder: Path, n_parameters: int) -> tuple[dict[str, Field], tuple[str, ...]]:
    """The fields, and warnings about unusable files: a bad card is no reason to refuse a model."""
    try:
        return _fields(_load(folder, n_parameters), folder, n_parameters), ()
    except _UNUSABLE as error:
        warning = f"{str(folder)!r}: neither its card nor {GENERATION_FILE!r} is used: {error}"
        return _fields(Metadata(), folder, n_parameters), (warning,)


def _load(folder: Path, n_parameters: int) -> Any:
    card, generation = folder / CARD_FILE, folder / GENERATION_FILE
    if card.is_file() and (size := card.stat().st_size) > MAX_CARD_BYTES:
        raise SourceInvalid(f"{CARD_FILE!r} has {size} bytes, the limit is {MAX_CARD_BYTES}")
    sampling = read_json(generation) if generation.is_file() else {}
    metadata = Metadata.load(None, folder.resolve(), None, n_parameters)
    # llama.cpp's converter reads this, the library's released version does not yet
    if metadata.sampling_penalty_repeat is None:
        metadata.sampling_penalty_repeat = sampling.get("repetition_penalty")
    return metadata


def _fields(metadata: Any, folder: Path, n_parameters: int) -> dict[str, Field]:
    if metadata.name is None:
        metadata.name = folder.resolve().name
    if metadata.size_label is None:
        metadata.size_label = size_label(n_parameters, n_parameters, 0, 0)
    writer = GGUFWriter(path=None, arch="")
    metadata.set_gguf_meta_model(writer)
    fields = {key: _field(entry.type, entry.value) for key, entry in writer.kv_data[0].items()}
    return {key: field for key, field in fields.items() if field is not None and key != "general.architecture"}


def _field(kind: Any, value: Any) -> Field | None:
    """The value as a field, None if its type does not fit `kind`: a card may hold anything."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 31
    if kind == GGUFValueType.STRING and isinstance(value, str):
        return Field.string(value)
    if kind == GGUFValueType.UINT32 and is_number and value == int(value) >= 0:
        return Field.uint32(int(value))
    if kind == GGUFValueType.INT32 and is_number and value == int(value):
        return Field.int32(int(value))
    if kind == GGUFValueType.FLOAT32 and is_number:
        return Field.float32(value)
    if kind == GGUFValueType.ARRAY and isinstance(value, list) and all(isinstance(text, str) for text in value):
        return Field.string_array([text.encode() for text in value])
    return None
