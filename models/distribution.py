"""A model file out of installed Python distributions: found through their metadata and read as data, never imported."""

import hashlib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from .errors import DownloadFailed
from .files import CHUNK_BYTES, Progress
from .sources import DistributionFiles, DistributionPart


def join_parts(source: DistributionFiles, destination: Path, progress: Progress | None = None) -> str:
    """Write the parts in order into `destination` and return the sha256 of the whole.

    Raises DownloadFailed naming every distribution that is not installed, or the file that one of them lacks.
    """
    files = _locate(source)
    total = sum(file.stat().st_size for file in files)
    digest, done = hashlib.sha256(), 0
    with destination.open("wb") as out:
        for file in files:
            with file.open("rb") as part:
                while chunk := part.read(CHUNK_BYTES):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
    return digest.hexdigest()


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
