"""A source -> a verified file. The one door to the Hugging Face Hub, whose errors become ours here.

A dropped connection is resumed with a Range request, as often as data keeps coming. `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE` are honoured; a file that the Hub's own cache holds already is taken from there.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .distribution import join_parts
from .errors import DownloadFailed, HashMismatch
from .files import Progress, check_free, sha256_file
from .sources import HubFile, HubRepo, parse_source

__all__ = ["HubFacts", "Progress", "fetch", "look_up"]

_SHA256_LENGTH = 64


@dataclass(frozen=True)
class HubFacts:
    """What the Hub says of a file before it is fetched. `sha256` is None when it keeps the file outside LFS."""

    commit: str
    size_bytes: int | None
    sha256: str | None


def fetch(
    source: str,
    destination: Path,
    *,
    sha256: str | None,
    size_bytes: int | None,
    progress: Progress | None = None,
) -> Path:
    """Bring the file of `source` (see models/sources.py) to `destination` and return that path.

    It is written beside `destination` and renamed when it is whole and its hash is right; on failure nothing is left.
    Raises DownloadFailed, HashMismatch, or StoreError when the disk is too small for `size_bytes`.
    """
    parsed = parse_source(source)
    check_free(destination.parent, size_bytes or 0)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetch.") as folder:
        try:
            if isinstance(parsed, HubFile):
                part = _from_hub(parsed, Path(folder), sha256, progress)
                found = sha256_file(part)
            else:
                part = Path(folder) / destination.name
                found = join_parts(parsed, part, progress)
        except OSError as error:
            raise DownloadFailed(f"{parsed}: {error}") from error
        if sha256 is not None and found != sha256:
            raise HashMismatch(f"{parsed} delivered a file with sha256 {found}, expected {sha256}")
        part.replace(destination)
    return destination


def look_up(source: HubFile) -> HubFacts:
    """Ask the Hub for the commit, size and hash of a file. Raises DownloadFailed."""
    with hub_errors(source):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        endpoint = os.environ.get("HF_ENDPOINT")
        url = hf_hub_url(source.repo, source.path, revision=source.revision, endpoint=endpoint)
        facts = get_hf_file_metadata(url, endpoint=endpoint)
    if facts.commit_hash is None:
        raise DownloadFailed(f"{source}: {url} is not answered by a Hugging Face Hub; check HF_ENDPOINT and proxies")
    # The ETag of a file in LFS is its sha256; that of any other file is a git blob's sha1.
    sha256 = facts.etag if facts.etag is not None and len(facts.etag) == _SHA256_LENGTH else None
    return HubFacts(facts.commit_hash, facts.size, sha256)


def _from_hub(source: HubFile, folder: Path, sha256: str | None, progress: Progress | None) -> Path:
    with hub_errors(source):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(source.repo, source.path, revision=source.revision)
        if sha256 is not None and isinstance(cached, str) and sha256_file(Path(cached), progress) == sha256:
            return Path(shutil.copyfile(cached, folder / "cached.gguf"))
        return Path(
            hf_hub_download(
                source.repo,
                source.path,
                revision=source.revision,
                local_dir=folder,
                # Its own cache is looked at above, where a damaged file is not taken for the right one.
                cache_dir=folder / "cache",
                endpoint=os.environ.get("HF_ENDPOINT"),
                tqdm_class=tqdm_for(progress),
            )
        )


@contextmanager
def hub_errors(source: HubFile | HubRepo) -> Iterator[None]:
    """Whatever the Hub's client raises while `source` is fetched becomes a DownloadFailed that names it."""
    from huggingface_hub import errors

    # The transport's base class comes from whichever httpx this huggingface_hub was built on.
    transport_error = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadFailed(
            f"{source}: the repository's page must grant you access first; then set HF_TOKEN or run `hf auth login`"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        reason = "HF_HUB_OFFLINE is set; unset it to download" if is_offline() else "the Hub cannot be reached"
        raise DownloadFailed(f"{source}: {reason} ({_first_line(error)})") from error
    except (errors.EntryNotFoundError, errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise DownloadFailed(f"{source}: {_first_line(error)}") from error
    except Exception as error:
        if not isinstance(error, transport_error):
            raise
        raise DownloadFailed(f"{source}: {type(error).__name__}: {_first_line(error)}") from error


def is_offline() -> bool:
    """Whether the user forbade the Hub's client to connect."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def tqdm_for(progress: Progress | None, before: int = 0) -> type[Any]:
    """A tqdm that draws nothing and tells `progress` instead: whoever called us decides what is shown.

    `before` bytes were there already when its file began.
    """
    from tqdm import tqdm

    class Reporter(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._done: int = kwargs.get("initial", 0)
            self._size: int | None = kwargs.get("total")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if progress is not None:
                progress(before + self._done, self._size)
            return None

    return Reporter
