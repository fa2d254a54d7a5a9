"""Open a Hugging Face folder as a checkpoint: its header in GGUF's terms, its weights in slabs, without PyTorch.

Opening it finds every fault that shows without reading the weights: each tensor's name, shape and type is checked
against config.json before anything is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType

from convert.errors import CLASSIFICATION_HEAD, SourceInvalid
from convert.families.base import Family, Weight, interleave_halves
from convert.tokenizer.read import VocabularyFields
from convert.tokenizer.spacing import general_name
from models.gguf.fields import Field
from models.gguf.header import DEFAULT_ALIGNMENT, Header, TensorInfo

from .config import FolderConfig, general_fields, read_config
from .safetensors import READABLE
from .shards import Place, Shards, check_plain

_FILE_TYPE_F16 = 1
_F32 = GGMLQuantizationType.F32
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HEADS = ("score.", "classifier.", "qa_outputs.")
# A slab takes several forms on its way to the file: small enough to stay in the processor's cache.
CACHED_SLAB_ELEMENTS = 1 << 18


ReadVocabulary = Callable[[Path, Mapping[str, Any], int], VocabularyFields]
"""(folder, config.json's values, rows of the embedding) -> the vocabulary, padded to that many tokens."""


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor of the GGUF: computed `values`, or a `weight` with the places of its sources."""

    weight: Weight | None
    places: Sequence[Place]
    values: np.ndarray | None = None


class HfCheckpoint:
    """A Hugging Face folder, open for reading. Close it when done."""

    def __init__(self, folder: Path, read_vocabulary: ReadVocabulary) -> None:
        """Read config.json, the headers of the weights and the tokenizer.

        Raises SourceInvalid naming the file, the tensor or the setting at fault, ArchitectureUnknown, and the errors
        of `read_vocabulary`.
        """
        if not folder.is_dir():
            raise SourceInvalid(f"{str(folder)!r} is not a folder")
        found = read_config(folder)
        self._shards = Shards(folder)
        try:
            plain = check_plain(folder, found.raw, self._shards.places)
            named = _named(folder, found.family, self._shards.places)
            found, warnings = _settle_head(folder, found, named)
            self._tensors = _plan(folder, found, named)
            infos = {name: _info(name, tensor) for name, tensor in self._tensors.items()}
            vocabulary = read_vocabulary(folder, found.raw, found.family.sizes(found.config).n_vocab)
            general, card_warnings = general_fields(folder, sum(info.n_elements for info in infos.values()))
            fields = {**_fields(found, general), **vocabulary.fields}
            called = fields["general.name"].value
            fields["general.name"] = Field.string(general_name(str(called), vocabulary.name_part))
        except BaseException:
            self._shards.close()
            raise
        self.warnings = (*plain, *found.family.warnings(found.config), *warnings, *card_warnings, *vocabulary.warnings)
        self.header = Header(folder, fields, infos, DEFAULT_ALIGNMENT)
        self.config: Mapping[str, Any] = found.raw
        self.template_rules = vocabulary.rules

    def close(self) -> None:
        """Close the files."""
        self._shards.close()

    def slabs(self, tensor: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, float32 array of shape (rows, n_in)), in the GGUF's order and form.

        Raises SourceInvalid naming a tensor with a value that is not finite.
        """
        planned = self._tensors[tensor.name]
        if planned.values is not None:
            yield 0, planned.values.reshape(-1, planned.values.shape[-1])
        elif planned.weight is not None and len(planned.places) > 1:
            yield 0, np.concatenate([place.file.rows(place.tensor, 0, 1) for place in planned.places])
        elif planned.weight is not None:
            yield from _read(planned.weight, planned.places[0])


def _read(weight: Weight, place: Place) -> Iterator[tuple[int, np.ndarray]]:
    if len(weight.shape) == 1:
        values = place.file.rows(place.tensor, 0, 1)
        if weight.heads is not None:
            values = interleave_halves(values.reshape(-1), weight.heads).reshape(1, -1)
        yield 0, values + np.float32(weight.offset) if weight.offset else values
        return
    n_rows, width = weight.shape
    group = 1 if weight.heads is None else n_rows // weight.heads
    step = max(1, CACHED_SLAB_ELEMENTS // (width * group)) * group
    for first in range(0, n_rows, step):
        rows = place.file.rows(place.tensor, first, min(step, n_rows - first))
        yield first, rows if weight.heads is None else interleave_halves(rows, len(rows) // group)


def _settle_head(folder: Path, found: FolderConfig, named: dict[str, Place]) -> tuple[FolderConfig, tuple[str, ...]]:
    """config.json with 'tie_word_embeddings' corrected by the weights, where both matrices exist; and warnings.

    A head equal to its embedding is removed from `named`. Merging tools and trainers leave 'tie_word_embeddings' true
    beside a head that was trained. Raises SourceInvalid for a missing head, and for one that llama.cpp cannot use.
    """
    family, config = found.family, found.config
    head, embedding = named.get(_OUTPUT), named.get(_EMBEDDING)
    warnings: tuple[str, ...] = ()
    if family.is_tied(config) and head is not None and embedding is not None:
        if family.may_tie and _is_equal(head, embedding):
            del named[_OUTPUT]
            warnings = (f"{_OUTPUT!r} is left out: it equals the embedding, which is the output, too",)
        else:
            config = config.changed(tie_word_embeddings=False)
            warnings = (
                f"{_OUTPUT!r} is written, although config.json says 'tie_word_embeddings': it was trained apart",
            )
    family.check_head(config)
    if _OUTPUT not in named and not family.is_tied(config):
        raise config.bad("tie_word_embeddings", _no_head(folder))
    return replace(found, config=config), warnings


def _no_head(folder: Path) -> str:
    return (
        f"but {str(folder)!r} has no tensor {_OUTPUT!r}. If the model was trained with the embedding as its output, "
        "set 'tie_word_embeddings' to true; otherwise the output was lost: save the model again, with save_pretrained"
    )


def _is_equal(one: Place, other: Place) -> bool:
    """True if two matrices hold the same numbers, of any types. Stops at the first slab that differs."""
    shape = one.tensor.shape
    if len(shape) != 2 or shape != other.tensor.shape:
        return False
    step = max(1, CACHED_SLAB_ELEMENTS // max(1, shape[1]))
    for first in range(0, shape[0], step):
        ours, theirs = (place.file.rows(place.tensor, first, min(step, shape[0] - first)) for place in (one, other))
        if not np.array_equal(ours, theirs):
            return False
    return True


def _plan(folder: Path, found: FolderConfig, named: Mapping[str, Place]) -> dict[str, _PlannedTensor]:
    """The GGUF's tensors in the order of llama.cpp's converter, computed ones first."""
    family, config = found.family, found.config
    weights = [(weight, _sources(folder, weight, named)) for weight in family.weights(config)]
    expected = {source for weight, _ in weights for source in weight.sources}
    if heads := sorted(name for name in named.keys() - expected if name.startswith(_HEADS)):
        raise SourceInvalid(f"{str(folder)!r} holds {heads[0]!r}: {CLASSIFICATION_HEAD}")
    if unknown := sorted(named.keys() - expected):
        raise SourceInvalid(
            f"{str(folder)!r} holds {len(unknown)} tensors that config.json does not explain, such as {unknown[0]!r}"
        )
    order = dict(zip(named, count(), strict=False))
    weights.sort(key=lambda entry: max(order[source] for source in entry[0].sources))
    computed = {name: _PlannedTensor(None, (), values) for name, values in family.extras(config).items()}
    return {**computed, **{weight.name: _PlannedTensor(weight, sources) for weight, sources in weights}}


def _named(folder: Path, family: Family, places: Mapping[str, Place]) -> dict[str, Place]:
    named: dict[str, Place] = {}
    for name, place in places.items():
        known = family.source_name(name)
        if known in named:
            raise SourceInvalid(f"{str(folder)!r} holds {known!r} twice, the second time as {name!r}")
        if known is not None:
            named[known] = place
    return named


def _sources(folder: Path, weight: Weight, named: Mapping[str, Place]) -> list[Place]:
    found = []
    for source in weight.sources:
        place = named.get(source)
        if place is None:
            raise SourceInvalid(f"{str(folder)!r} has no tensor {source!r}, which config.json asks for")
        path, tensor = str(place.file.path), place.tensor
        if tensor.shape != weight.shape:
            hint = _rows_hint(tensor.shape, weight.shape) if source in {_OUTPUT, _EMBEDDING} else ""
            raise SourceInvalid(
                f"{path!r}: tensor {tensor.name!r} has shape {tensor.shape}; by config.json it is {weight.shape}{hint}"
            )
        if tensor.dtype not in READABLE:
            raise SourceInvalid(
                f"{path!r}: tensor {tensor.name!r} has type {tensor.dtype}; known are {', '.join(READABLE)}"
            )
        found.append(place)
    return found


def _rows_hint(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The way out where tokens were added, and config.json or one of the two matrices has the number of before."""
    if len(found) != len(wanted) or found[1:] != wanted[1:]:
        return ""
    return (
        f". If tokens were added: set 'vocab_size' to {found[0]} in config.json if both matrices have that many rows, "
        "else call `model.resize_token_embeddings(len(tokenizer))` and save the model again"
    )


def _info(name: str, tensor: _PlannedTensor) -> TensorInfo:
    if tensor.values is not None or tensor.weight is None:
        assert tensor.values is not None, f"{name!r} is computed or read"
        return TensorInfo(name, tensor.values.shape, _F32, 0, tensor.values.nbytes)
    types = {place.tensor.dtype for place in tensor.places}
    kind = GGMLQuantizationType[types.pop()] if len(types) == 1 and not tensor.weight.offset else _F32
    shape = tensor.weight.out_shape
    return TensorInfo(name, shape, kind, 0, prod(shape) * (4 if kind == _F32 else 2))


def _fields(found: FolderConfig, general: Mapping[str, Field]) -> dict[str, Field]:
    architecture = found.family.architecture
    own = {f"{architecture}.{key}": field for key, field in found.family.fields(found.config).items()}
    return {
        "general.architecture": Field.string(architecture),
        "general.type": Field.string("model"),
        **general,
        **own,
        "general.file_type": Field.uint32(_FILE_TYPE_F16),
        "general.quantization_version": Field.uint32(GGML_QUANT_VERSION),
    }
