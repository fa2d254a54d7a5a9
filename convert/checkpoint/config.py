"""Read the config.json of a Hugging Face folder: the model family, and the values of its text model."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import CLASSIFICATION_HEAD, ArchitectureUnknown, SourceInvalid, inner_folder, json_fault
from convert.families import BY_CLASS
from convert.families.base import Family
from convert.families.config import Config

CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 64 << 20


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
