"""The source of a file, as text in the catalogue or on a command line, and as a value.

hf://owner/name/path/to/file.gguf@revision        a file in a Hugging Face repository (revision: `main` if left out)
hf://owner/name@revision                          a whole checkpoint, to be converted
dist://distribution/path/in/it dist://…           data files of installed Python distributions, joined in this order
"""

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from models.common.files import Progress, copy_files
from models.errors import DownloadFailed

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
