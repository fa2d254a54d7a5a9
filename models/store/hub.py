"""Fetch a source into a verified file. The only door to the Hugging Face Hub, with its errors translated.

A dropped connection is resumed with a Range request, as often as data keeps coming. `HF_ENDPOINT`, `HF_TOKEN` and
`HF_HUB_OFFLINE` are honoured; a file that the Hub's own cache holds already is taken from there.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.files import PICKLE_SUFFIXES, Progress, check_free, sha256_file
from models.errors import DownloadFailed, HashMismatch

from .catalog import HubFile, HubRepo, join_parts, parse_source

__all__ = ["HubFacts", "Progress", "fetch", "look_up"]

_SHA256_LENGTH = 64


@dataclass(frozen=True)
class HubFacts:
    """Facts about a file, known before it is fetched. `sha256` is None when the Hub keeps the file outside LFS."""

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
    """Fetch the file of `source` (see models/store/catalog.py) to `destination` and return that path.

    It is written beside `destination` and renamed once its hash is verified; a failure leaves nothing behind.
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
                # Its own cache is searched above, where the hash is verified.
                cache_dir=folder / "cache",
                endpoint=os.environ.get("HF_ENDPOINT"),
                tqdm_class=tqdm_for(progress),
            )
        )


@contextmanager
def hub_errors(source: HubFile | HubRepo) -> Iterator[None]:
    """Turn every error of the Hub's client into a DownloadFailed that names `source`."""
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
    """True if HF_HUB_OFFLINE forbids the Hub's client to connect."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def tqdm_for(progress: Progress | None, before: int = 0) -> type[Any]:
    """A tqdm class that calls `progress` and draws nothing.

    `before` is the number of bytes fetched before this file.
    """
    from tqdm import tqdm

    class SilentTqdm(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._done: int = kwargs.get("initial", 0)
            self._size: int | None = kwargs.get("total")
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if progress is not None:
                progress(before + self._done, self._size)
            return None

    return SilentTqdm


_CHECKPOINT_FILES = re.compile(
    r"(model[\w.-]*\.safetensors(\.index\.json)?|config\.json|generation_config\.json|tokenizer[\w.-]*\.json|"
    r"tokenizer\.model|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|"
    r"processor_config\.json|(additional_)?chat_templates/[\w.-]+\.jinja)"
)


def fetch_checkpoint(source: HubRepo, progress: Progress | None = None) -> Path:
    """Fetch the missing files of a checkpoint and return their folder.

    Weights are checked against the sha256 that the Hub promises. Raises DownloadFailed (no such repository, no access,
    no safetensors in it …), HashMismatch, or StoreError when the disk is too small.
    """
    with hub_errors(source):
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

        endpoint = os.environ.get("HF_ENDPOINT")
        if is_offline():
            return Path(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
        info = HfApi(endpoint=endpoint).model_info(source.repo, revision=source.revision, files_metadata=True)
        files = _chosen(source, info.siblings or [])
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        check_free(cache, sum(file.size or 0 for file in files))
        done = 0
        for file in files:
            path = hf_hub_download(
                source.repo,
                file.rfilename,
                # Only the last file is fetched by the revision's name: the cache notes it and then needs no network.
                revision=source.revision if file is files[-1] else info.sha,
                cache_dir=cache,
                endpoint=endpoint,
                tqdm_class=tqdm_for(progress, done),
            )
            _check(source, file, Path(path))
            done += file.size or 0
    folder = Path(path).parent
    if folder.name != info.sha:
        raise DownloadFailed(f"{source} changed while it was fetched ({info.sha} to {folder.name}); fetch it again")
    return folder


def _chosen(source: HubRepo, siblings: Sequence[Any]) -> list[Any]:
    """The files to fetch, config.json last: its folder is the checkpoint's."""
    chosen = [file for file in siblings if _CHECKPOINT_FILES.fullmatch(file.rfilename)]
    names = [file.rfilename for file in chosen]
    if "config.json" not in names:
        raise DownloadFailed(f"{source} is no checkpoint: it has no 'config.json'")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [file.rfilename for file in siblings if file.rfilename.endswith(PICKLE_SUFFIXES)]
        why = f"its weights are pickles ({pickles[0]!r} …), which are not opened" if pickles else "it has no weights"
        raise DownloadFailed(f"{source} has no model*.safetensors: {why}; save the model as safetensors")
    return sorted(chosen, key=lambda file: (file.rfilename == "config.json", file.rfilename))


def _check(source: HubRepo, file: Any, path: Path) -> None:
    promised = file.lfs.sha256 if file.lfs is not None else None
    if promised is not None and (found := sha256_file(path)) != promised:
        # Without this the Hub's client would use the damaged file from its cache.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HashMismatch(f"{source}: {file.rfilename!r} has sha256 {found}, the Hub says {promised}; fetch it again")
