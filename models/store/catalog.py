"""The models Deskside knows by name: `catalog.toml`, read and checked."""

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator, model_validator

from models.common.record import Record
from models.errors import BadCatalog, DownloadFailed, ModelNotFound, did_you_mean
from models.manifest import Artefact, Name

from .sources import parse_source

DEFAULT_MODEL = "email-triage"
_HERE = Path(__file__).parents[1]


class CatalogEntry(Record):
    """A known model: either a file with its `sources` in order, or a `recipe` that `deskside convert` builds.

    In a recipe `file`, `quantization` and `sha256` are empty and `size_bytes` is 0: they depend on the build.
    """

    name: Name
    description: str
    licence: str
    licence_notice: str = ""
    file: str = ""
    quantization: str = ""
    size_bytes: int = 0
    sha256: str = ""
    sources: tuple[str, ...] = ()
    hint: str = ""
    recipe: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = ""

    @field_validator("sources")
    @classmethod
    def _readable(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(str(parse_source(source)) for source in sources)
        except DownloadFailed as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _file_or_recipe(self) -> "CatalogEntry":
        if bool(self.sources) == bool(self.recipe):
            raise ValueError("an entry has either sources or a recipe")
        if self.sources:
            self.artefact()
        elif self.file or self.sha256:
            raise ValueError("a recipe has no file of its own, and so no sha256")
        return self

    def artefact(self) -> Artefact:
        """The file that the sources deliver, for the manifest. Not for recipes."""
        return Artefact(file=self.file, quantization=self.quantization, size_bytes=self.size_bytes, sha256=self.sha256)

    def recipe_folder(self) -> Path:
        """The folder with the recipe's `model.toml` and adapter. For recipes only."""
        return _HERE / self.recipe


class Catalog:
    """All entries, by name."""

    def __init__(self, entries: tuple[CatalogEntry, ...]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise BadCatalog(f"names must differ, got {[entry.name for entry in entries]!r}")

    def names(self) -> list[str]:
        """The known names, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> CatalogEntry:
        """The entry of that name. Raises ModelNotFound naming the known ones."""
        if name not in self._entries:
            raise ModelNotFound(
                f"{name!r} is not in the catalogue ({', '.join(self.names())}){did_you_mean(name, self.names())}; "
                "any other model is reachable as hf://owner/name/file.gguf@revision"
            )
        return self._entries[name]


class _Document(Record):
    models: tuple[CatalogEntry, ...]


def load_catalog(path: Path | None = None) -> Catalog:
    """Read a catalogue, by default the one that comes with Deskside. Raises BadCatalog naming the entry and field."""
    file = path if path is not None else _HERE / "catalog.toml"
    try:
        document = _Document.model_validate(tomllib.loads(file.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadCatalog(f"{str(file)!r} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadCatalog(f"{str(file)!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return Catalog(document.models)
