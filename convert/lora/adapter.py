"""Read a PEFT LoRA or DoRA adapter from its folder: the change of each module, under Hugging Face's names.

Everything is checked before anything is written: a half-copied file, or a variant with another merge formula, would
give a model that loads, runs and babbles. Whole tensors trained beside the LoRA stay in the file until they are
written: an embedding can be far larger than the rest of the adapter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convert.checkpoint.safetensors import SafetensorsFile
from convert.errors import CLASSIFICATION_HEAD, AdapterInvalid, SourceInvalid
from models.common.file_kinds import file_kind
from models.common.files import sha256_file

from .changes import Lora, ReplaceRows, SavedTensor
from .config import ADAPTER_CONFIG_FILE, LoraConfig, read_config

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE = "lora_magnitude_vector"
_TOKENS = "token_adapter.trainable_tokens_delta"
_WHOLE = ("weight", "bias")
# PEFT's name of a tensor in a wrapped module -> the name used here
_PARTS: Mapping[str, str] = {
    **{name: name for name in (_A, _B, _BIAS, _EMBEDDING_A, _EMBEDDING_B, _MAGNITUDE, _TOKENS)},
    f"{_MAGNITUDE}.weight": _MAGNITUDE,
    "base_layer.weight": "weight",
    "base_layer.bias": "bias",
    **{name: name for name in _WHOLE},
}
_NAME = re.compile(rf"{re.escape(_PREFIX)}([A-Za-z0-9_.]+?)\.({'|'.join(map(re.escape, _PARTS))})")

_HEAD = re.compile(r"^base_model\.model\.(score|classifier|qa_outputs|summary)\.")
# `lora_A.default.weight`: parts of a module, and the adapter's name among its parts
_WITH_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)$)[A-Za-z0-9_-]+(?=\.|$)"
)

_Parts = Mapping[str, SavedTensor]


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """An adapter's folder: LoRAs and trained rows by module, whole tensors and bias shifts by parameter.

    `rank` is the configuration's; single modules may have another. `base` names the model it was trained on.
    """

    folder: Path
    sha256: str
    rank: int
    base: str
    loras: Mapping[str, Lora]
    saved: Mapping[str, SavedTensor] = field(default_factory=dict)
    shifts: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokens: Mapping[str, ReplaceRows] = field(default_factory=dict)

    @property
    def is_zero(self) -> bool:
        """True if merging changes nothing: PEFT starts with B = 0, so the adapter was never trained.

        A DoRA and whole tensors could be compared with the base only; they count as trained.
        """
        more = self.saved or self.tokens or any(np.any(shift) for shift in self.shifts.values())
        return not more and not any(
            lora.magnitude is not None or (np.any(lora.b) and np.any(lora.a)) for lora in self.loras.values()
        )


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a PEFT folder. Raises AdapterInvalid naming the file, the setting or the tensor that is wrong."""
    if folder.is_file():
        given = file_kind(folder)
        own = given.kind in {"safetensors", "json", "json lines"} and (folder.parent / ADAPTER_WEIGHTS_FILE).is_file()
        hint = f": give {str(folder.parent)!r}" if own else ""
        if given.kind == "gguf":
            hint = "; an adapter in GGUF cannot be read, give the PEFT folder that it was made from"
        elif given.kind == "csv":
            hint = "; examples are given by --examples"
        raise AdapterInvalid(
            f"{str(folder)!r} is {given.name}, not the folder of a PEFT adapter ({ADAPTER_CONFIG_FILE} and "
            f"{ADAPTER_WEIGHTS_FILE}){hint}"
        )
    config = read_config(folder)
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = (
            f"; {pickled.name!r} is a pickle, which could run any code: save it as safetensors"
            if pickled.exists()
            else ""
        )
        raise AdapterInvalid(f"{str(folder)!r} has no {ADAPTER_WEIGHTS_FILE!r}{hint}")
    try:
        modules = _modules(SafetensorsFile(path))
    except SourceInvalid as error:
        raise AdapterInvalid(f"the adapter's weights cannot be used: {error}") from error
    _check_complete(modules, config)
    return PeftAdapter(
        folder=folder,
        sha256=sha256_file(path),
        rank=config.rank,
        base=config.base,
        loras={module: lora for module, parts in modules.items() if (lora := _lora(module, parts, config)) is not None},
        saved={
            f"{module}.{kind}": parts[kind] for module, parts in modules.items() for kind in _WHOLE if kind in parts
        },
        shifts={f"{module}.bias": _shift(module, parts, config) for module, parts in modules.items() if _BIAS in parts},
        tokens={
            module: _tokens(module, parts[_TOKENS], config) for module, parts in modules.items() if _TOKENS in parts
        },
    )


def _modules(file: SafetensorsFile) -> dict[str, dict[str, SavedTensor]]:
    """Module -> its tensors by their name here, each checked to be readable and finite."""
    modules: dict[str, dict[str, SavedTensor]] = {}
    for name, tensor in file.tensors.items():
        if _HEAD.search(name):
            raise AdapterInvalid(f"{str(file.path)!r} holds {name!r}: {CLASSIFICATION_HEAD}")
        if ".original_module." in name:  # the base's own, which PEFT keeps beside a saved module
            continue
        match = _NAME.fullmatch(_saved_name(name))
        if match is None:
            raise AdapterInvalid(
                f"adapter tensor {name!r} is not supported: known are '{_PREFIX}MODULE.' and one of {', '.join(_PARTS)}"
            )
        parts, part = modules.setdefault(match[1], {}), _PARTS[match[2]]
        if part in parts:
            raise AdapterInvalid(f"adapter tensor {name!r} is {part!r} of {match[1]!r}, which occurs twice")
        parts[part] = _checked(SavedTensor(file, tensor))
    if not modules:
        raise AdapterInvalid(f"{str(file.path)!r} holds no tensors")
    return modules


def _saved_name(name: str) -> str:
    """The name that PEFT saves a tensor under: without the adapter's own name, which a bare state_dict has in it."""
    plain = _WITH_ADAPTER.sub(r".\1", name)
    return plain.replace(".modules_to_save.", ".")


def _checked(saved: SavedTensor) -> SavedTensor:
    if len(saved.shape) not in {1, 2} or 0 in saved.shape:
        raise AdapterInvalid(
            f"adapter tensor {saved.tensor.name!r} has shape {saved.shape}: neither a matrix nor a vector"
        )
    for _ in saved.slabs():  # reading raises if a value is not finite
        pass
    return saved


def _check_complete(modules: Mapping[str, _Parts], config: LoraConfig) -> None:
    """Raise AdapterInvalid if a tensor that adapter_config.json says was trained is missing."""
    for name in config.modules_to_save:
        if not any(
            _is_called(module, name) and any(kind in parts for kind in _WHOLE) for module, parts in modules.items()
        ):
            raise AdapterInvalid(f"modules_to_save names {name!r}, but the adapter holds no tensor of such a module")
    for name in config.tokens:
        if not any(_is_called(module, name) and _TOKENS in parts for module, parts in modules.items()):
            raise AdapterInvalid(f"trainable_token_indices names {name!r}, but the adapter holds no rows of it")


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _lora(module: str, parts: _Parts, config: LoraConfig) -> Lora | None:
    on_embedding = _EMBEDDING_A in parts or _EMBEDDING_B in parts
    names = (_EMBEDDING_A, _EMBEDDING_B) if on_embedding else (_A, _B)
    given = {_A, _B, _EMBEDDING_A, _EMBEDDING_B, _MAGNITUDE, _BIAS} & parts.keys()
    if not given:
        return None
    for part in (*names, *([_MAGNITUDE] if config.use_dora else [])):
        if part not in parts:
            raise AdapterInvalid(f"adapter tensor '{_PREFIX}{module}.{part}' is missing")
    a, b = parts[names[0]].array, parts[names[1]].array
    rank = config.rank_of(module)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterInvalid(
            f"adapter tensors of {module!r} have shapes A {a.shape} and B {b.shape}; "
            f"with rank {rank} they must be ({rank}, n_in) and (n_out, {rank})"
        )
    magnitude = _magnitude(module, parts, len(b), config)
    if on_embedding:
        if magnitude is not None:
            raise AdapterInvalid(
                f"adapter target {module!r} is an embedding under DoRA, which scales columns and needs all rows for "
                "that: merge it with PEFT (merge_and_unload) and convert the merged folder"
            )
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    return Lora(module, a, b, config.scale_of(module), magnitude, on_embedding)


def _magnitude(module: str, parts: _Parts, n_out: int, config: LoraConfig) -> np.ndarray | None:
    if _MAGNITUDE not in parts:
        return None
    if not config.use_dora:
        raise AdapterInvalid(f"adapter tensor '{_PREFIX}{module}.{_MAGNITUDE}' exists, but use_dora is not set")
    return _vector(module, _MAGNITUDE, parts, n_out)


def _shift(module: str, parts: _Parts, config: LoraConfig) -> np.ndarray:
    """The shift of a bias: the bias of B, scaled like B itself."""
    if not config.lora_bias:
        raise AdapterInvalid(f"adapter tensor '{_PREFIX}{module}.{_BIAS}' exists, but lora_bias is not set")
    return _vector(module, _BIAS, parts, parts[_B].shape[0]) * np.float32(config.scale_of(module))


def _vector(module: str, part: str, parts: _Parts, n_out: int) -> np.ndarray:
    if parts[part].shape != (n_out,):
        raise AdapterInvalid(
            f"adapter tensor '{_PREFIX}{module}.{part}' has shape {parts[part].shape}; its B has {n_out} rows"
        )
    return parts[part].array


def _tokens(module: str, saved: SavedTensor, config: LoraConfig) -> ReplaceRows:
    ids = next((ids for name, ids in config.tokens.items() if _is_called(module, name)), ())
    if len(saved.shape) != 2 or len(ids) != saved.shape[0] or len(set(ids)) != len(ids):
        raise AdapterInvalid(
            f"adapter target {module!r} has trained rows of shape {saved.shape} for {len(ids)} "
            f"trainable_token_indices, {len(set(ids))} of them different: there must be one row for each"
        )
    order = np.argsort(ids)
    return ReplaceRows(np.asarray(ids)[order], saved.array[order])
