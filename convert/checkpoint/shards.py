"""The weight files of a Hugging Face folder: one safetensors file, or shards with an index of tensor -> file.

Pickles are never opened: reading one runs the code in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.errors import SourceInvalid
from models.common.files import PICKLE_SUFFIXES

from .config import read_json
from .safetensors import SafetensorsFile, StoredTensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
_NO_WEIGHTS = {"optimizer.pt", "scheduler.pt", "training_args.bin"}


@dataclass(frozen=True)
class Place:
    """The place of a tensor: its file, and its entry there."""

    file: SafetensorsFile
    tensor: StoredTensor


class Shards:
    """All weight files of a folder, open for reading. `places`: every tensor, file by file, ordered by name."""

    def __init__(self, folder: Path) -> None:
        """Open the files and check them against the index. Raises SourceInvalid naming the file or the tensor."""
        index = _read_index(folder)
        self._files: list[SafetensorsFile] = []
        try:
            for name in [WEIGHTS_FILE] if index is None else sorted(set(index.values())):
                self._files.append(_open(folder / name))
            self.places: Mapping[str, Place] = _places(self._files)
            if index is not None:
                _check_index(folder / INDEX_FILE, index, self.places)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _read_index(folder: Path) -> Mapping[str, str] | None:
    """Tensor name -> file name; None for a folder with one weight file."""
    path = folder / INDEX_FILE
    single = (folder / WEIGHTS_FILE).is_file()
    if not path.is_file():
        if not single:
            raise SourceInvalid(_no_weights(folder))
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceInvalid(f"{str(path)!r} has no table 'weight_map'")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise SourceInvalid(f"{str(path)!r} says tensor {tensor!r} is in {name!r}, which is not a safetensors file")
    files = set(weight_map.values())
    if len(files) > MAX_SHARDS:
        raise SourceInvalid(f"{str(path)!r} names {len(files)} files, the limit is {MAX_SHARDS}")
    if single and WEIGHTS_FILE not in files:
        raise SourceInvalid(
            f"{str(folder)!r} holds {WEIGHTS_FILE!r} and the {len(files)} shards of {INDEX_FILE!r}: "
            "remove the one that is out of date"
        )
    return weight_map


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if parts := [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]:
        return f"{str(folder)!r} holds {parts[0]!r}, but no {INDEX_FILE!r}, which says what the shards must hold"
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES) and name not in _NO_WEIGHTS]:
        return (
            f"{str(folder)!r} holds its weights in {pickles[0]!r}, a pickle: opening it could run any code. "
            "Save them as safetensors: `model.save_pretrained(FOLDER, safe_serialization=True)`"
        )
    return f"{str(folder)!r} has no {WEIGHTS_FILE!r}"


def _open(path: Path) -> SafetensorsFile:
    if not path.is_file():
        raise SourceInvalid(f"{str(path)!r} is missing: {INDEX_FILE!r} names it; download it again")
    return SafetensorsFile(path)


def _places(files: list[SafetensorsFile]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in places:
                raise SourceInvalid(
                    f"tensor {name!r} is in both {str(places[name].file.path)!r} and {str(file.path)!r}"
                )
            places[name] = Place(file, tensor)
    return places


def _check_index(path: Path, index: Mapping[str, str], places: Mapping[str, Place]) -> None:
    for name, file in index.items():
        if name not in places or places[name].file.path.name != file:
            raise SourceInvalid(f"{str(path)!r} says tensor {name!r} is in {file!r}, where it is not")
    if extra := sorted(places.keys() - index.keys()):
        raise SourceInvalid(
            f"{str(places[extra[0]].file.path)!r} holds tensor {extra[0]!r}, which {INDEX_FILE!r} does not list"
        )
