"""The models Deskside knows by name: `catalog.toml`, read and checked; and the sources of files and checkpoints.

A source is text in the catalogue or on a command line:

hf://owner/name/path/to/file.gguf@revision        a file in a Hugging Face repository (revision: `main` if left out)
hf://owner/name@revision                          a whole checkpoint, to be converted
dist://distribution/path/in/it dist://…           data files of installed Python distributions, joined in this order
"""

import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator, model_validator

from models.common.files import Progress, copy_files
from models.common.record import Record
from models.errors import BadCatalog, DownloadFailed, ModelNotFound, did_you_mean
from models.manifest import Artefact, Name

DEFAULT_MODEL = "email-triage"
_HERE = Path(__file__).parents[1]
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)/(?P<path>[^@\s]+?)(?:@(?P<revision>[\w./-]+))?")
_REPO = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_PART = re.compile(r"dist://(?P<distribution>[A-Za-z0-9._-]+)/(?P<path>\S+)")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository on the Hugging Face Hub, at a revision (branch, tag or commit)."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.path}@{self.revision}"


@dataclass(frozen=True)
class HubRepo:
    """A repository on the Hugging Face Hub that holds a checkpoint, at a revision (branch, tag or commit)."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.revision}"


@dataclass(frozen=True)
class DistributionPart:
    """A data file of an installed Python distribution; `path` is as in the distribution's RECORD."""

    distribution: str
    path: str

    def __str__(self) -> str:
        return f"dist://{self.distribution}/{self.path}"


@dataclass(frozen=True)
class DistributionFiles:
    """A file in parts: joined in order they are the whole."""

    parts: tuple[DistributionPart, ...]

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.parts)


Source = HubFile | DistributionFiles


def parse_source(text: str) -> Source:
    """Read a source. Raises DownloadFailed with the two forms when `text` is neither."""
    if match := _HUB.fullmatch(text.strip()):
        source = HubFile(match["repo"], match["path"], match["revision"] or "main")
        if _is_plain(source.path):
            return source
    parts = [_PART.fullmatch(word) for word in text.split()]
    if parts and all(parts):
        files = DistributionFiles(tuple(DistributionPart(part["distribution"], part["path"]) for part in parts if part))
        if all(_is_plain(part.path) for part in files.parts):
            return files
    raise DownloadFailed(
        f"{text!r} is not a source; use hf://owner/name/file.gguf@revision, or dist://distribution/path/in/it "
        "(several, separated by spaces, are joined)"
    )


def parse_repo(text: str) -> HubRepo | None:
    """The repository that `text` names, or None when it is no address of a whole repository."""
    match = _REPO.fullmatch(text.strip())
    return HubRepo(match["repo"], match["revision"] or "main") if match else None


def _is_plain(path: str) -> bool:
    return all(part not in {"", ".", ".."} for part in path.split("/"))


def join_parts(source: DistributionFiles, destination: Path, progress: Progress | None = None) -> str:
    """Write the parts in order into `destination` and return the sha256 of the whole.

    Raises DownloadFailed naming every distribution that is not installed, or the file that one of them lacks.
    """
    return copy_files(_locate(source), destination, progress)


def _locate(source: DistributionFiles) -> list[Path]:
    installed = {part: _installed(part.distribution) for part in source.parts}
    if missing := [part.distribution for part, found in installed.items() if found is None]:
        raise DownloadFailed(f"not installed: {', '.join(missing)}")
    return [_file(found, part) for part, found in installed.items() if found is not None]


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _file(found: Distribution, part: DistributionPart) -> Path:
    for listed in found.files or ():
        if listed.as_posix() == part.path:
            file = Path(str(found.locate_file(listed)))
            if file.is_file():
                return file
    raise DownloadFailed(f"{part.distribution} {found.version} is installed, but has no file {part.path!r}")


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
