"""Read the small files of a Hugging Face folder: config.json, the model card and generation_config.json.

config.json gives the model family and the values of its text model; card and configs give the `general.*` fields of a
GGUF (authorship, sampling defaults). The rules that split a model's name into parts are llama.cpp's, from the `gguf`
library.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from gguf import GGUFWriter, size_label
from gguf.constants import GGUFValueType
from gguf.metadata import Metadata

from convert.errors import CLASSIFICATION_HEAD, ArchitectureUnknown, SourceInvalid, inner_folder, json_fault
from convert.families import BY_CLASS
from convert.families.base import Family
from convert.families.config import Config
from models.gguf.fields import Field

CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 64 << 20
CARD_FILE = "README.md"
GENERATION_FILE = "generation_config.json"
MAX_CARD_BYTES = 1 << 20
# The library's errors on unexpected cards.
_UNUSABLE = (SourceInvalid, yaml.YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True)
class FolderConfig:
    """A checked config.json. `raw` holds the file's values; those of `text_config` override the outer ones."""

    family: Family
    config: Config
    raw: Mapping[str, Any]


def read_config(folder: Path) -> FolderConfig:
    """Read and check the folder's config.json.

    Raises SourceInvalid naming the file and the fault, ArchitectureUnknown for an unknown family.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        hint = ": it holds an adapter, give it with --adapter" if (folder / "adapter_config.json").is_file() else ""
        raise SourceInvalid(f"{str(folder)!r} has no {CONFIG_FILE!r}{hint or inner_folder(folder, CONFIG_FILE)}")
    raw = read_json(path)
    family = _family(path, raw)
    text = raw.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise SourceInvalid(f"{str(path)!r}: 'text_config' is {str(text)[:80]!r}; it must be a table")
    merged = {**raw, **(text or {})}
    config = Config(path, merged, family.defaults)
    family.check(config)
    return FolderConfig(family, config, merged)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size. Raises SourceInvalid naming the file."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise SourceInvalid(f"{str(path)!r} has {size} bytes, the limit is {MAX_JSON_BYTES}")
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceInvalid(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SourceInvalid(json_fault(path, error)) from error
    if not isinstance(parsed, dict):
        raise SourceInvalid(f"{str(path)!r} holds a {type(parsed).__name__}; it must be a table")
    return parsed


_HEADS = re.compile(r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)$")
# Classes with recurrent layers, all or some: llama.cpp computes them, but no prefix of them can be shared.
_RECURRENT = re.compile(
    r"Mamba|Lfm2|Jamba|Bamba|Zamba|RWKV|Rwkv|FalconH1|GraniteMoeHybrid|Hybrid|NemotronH|Plamo2|Qwen3Next|Qwen3_5|"
    r"KimiLinear|RecurrentGemma"
)


def _unknown(name: str) -> str:
    """Describe a class that no family has, and the way out."""
    if _HEADS.search(name):
        return f": {CLASSIFICATION_HEAD}"
    if _RECURRENT.search(name):
        return (
            ", whose layers are recurrent: such models cannot share prefixes and are not served, nor are their GGUF "
            f"files. Fine-tune a base of one of these instead: {', '.join(BY_CLASS)}"
        )
    return (
        f"; known are {', '.join(BY_CLASS)}. Convert it with llama.cpp's convert_hf_to_gguf.py, or download a GGUF of "
        "it, and pass the file with --gguf FILE"
    )


def _family(path: Path, raw: Mapping[str, Any]) -> Family:
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    family = BY_CLASS.get(name) if isinstance(name, str) else None
    if family is None:
        raise ArchitectureUnknown(f"{str(path)!r} names the architecture {name!r}{_unknown(str(name))}")
    return family


def general_fields(folder: Path, n_parameters: int) -> tuple[dict[str, Field], tuple[str, ...]]:
    """The fields, and warnings about unusable files: a bad card is no reason to refuse a model."""
    try:
        return _general(_load_card(folder, n_parameters), folder, n_parameters), ()
    except _UNUSABLE as error:
        warning = f"{str(folder)!r}: neither its card nor {GENERATION_FILE!r} is used: {error}"
        return _general(Metadata(), folder, n_parameters), (warning,)


def _load_card(folder: Path, n_parameters: int) -> Any:
    card, generation = folder / CARD_FILE, folder / GENERATION_FILE
    if card.is_file() and (size := card.stat().st_size) > MAX_CARD_BYTES:
        raise SourceInvalid(f"{CARD_FILE!r} has {size} bytes, the limit is {MAX_CARD_BYTES}")
    sampling = read_json(generation) if generation.is_file() else {}
    metadata = Metadata.load(None, folder.resolve(), None, n_parameters)
    # llama.cpp's converter reads this, the library's released version does not yet
    if metadata.sampling_penalty_repeat is None:
        metadata.sampling_penalty_repeat = sampling.get("repetition_penalty")
    return metadata


def _general(metadata: Any, folder: Path, n_parameters: int) -> dict[str, Field]:
    if metadata.name is None:
        metadata.name = folder.resolve().name
    if metadata.size_label is None:
        metadata.size_label = size_label(n_parameters, n_parameters, 0, 0)
    writer = GGUFWriter(path=None, arch="")
    metadata.set_gguf_meta_model(writer)
    fields = {key: _as_field(entry.type, entry.value) for key, entry in writer.kv_data[0].items()}
    return {key: field for key, field in fields.items() if field is not None and key != "general.architecture"}


def _as_field(kind: Any, value: Any) -> Field | None:
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
