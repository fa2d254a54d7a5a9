"""The folder of snapshots on disk, shared by any number of servers: what it holds, and what must go.

    DIR/<identity>/identity.json    in words, for `deskside cache list`
    DIR/<identity>/<key>.prefix     whole snapshots only, the time of their last use as time of change
    DIR/<identity>/.<…>.part        a file that is being written, locked by its writer

Nothing outside files of these names is ever touched.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from runtime.errors import LoadFailed

from .identity import Identity
from .snapshot_file import BadSnapshot, opened, read_head

IDENTITY_FILE = "identity.json"
SUFFIX = ".prefix"
_PART = ".part"
_FOLDER = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{40}\.prefix")
_UNFINISHED = re.compile(r"\..+\.part")


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A snapshot's file, its size and the time of its last use, in nanoseconds since 1970."""

    path: Path
    n_bytes: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Shelf:
    """The snapshots of one identity in sum; `identity` is None where its description is lost. Times as in KeptFile."""

    folder: Path
    identity: Identity | None
    n_files: int
    n_damaged: int
    n_tokens: int
    n_bytes: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """The snapshots that were deleted, and why others could not be."""

    n_files: int
    n_bytes: int
    failures: tuple[str, ...]


def prepare(root: Path) -> None:
    """Make the folder, for this user only, and try to write there. Raises LoadFailed with the reason."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"\0")
    except OSError as error:
        raise LoadFailed(
            f"prefixes cannot be kept in {str(root)!r}: {error.strerror}; "
            "give --prefix-disk a folder that can be written, or leave it out"
        ) from error


def kept_files(folder: Path) -> list[KeptFile]:
    """The snapshots in one identity's folder, least recently used first; none if the folder is gone."""
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if _FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    found.append(KeptFile(Path(entry.path), state.st_size, state.st_mtime_ns))
    return sorted(found, key=lambda file: (file.used_ns, file.path.name))


def identity_folders(root: Path) -> list[Path]:
    """The folder of each identity of this user's, sorted by name. Raises OSError if `root` cannot be read."""
    found = []
    with os.scandir(root) as entries:
        for entry in entries:
            if _FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        found.append(Path(entry.path))
    return sorted(found)


def bound(root: Path, max_bytes: int, then_bytes: int) -> tuple[list[KeptFile], list[KeptFile]]:
    """Delete the least recently used snapshots of any identity beyond `then_bytes`, if all have more than `max_bytes`.

    Returns (those left, those deleted). Raises OSError if the folder cannot be read or changed.
    """
    files = [file for folder in identity_folders(root) for file in kept_files(folder)]
    files.sort(key=lambda file: file.used_ns)
    n_bytes, n_gone = sum(file.n_bytes for file in files), 0
    excess = n_bytes - then_bytes if n_bytes > max_bytes else 0
    while excess > 0 and n_gone < len(files):
        files[n_gone].path.unlink(missing_ok=True)
        excess -= files[n_gone].n_bytes
        n_gone += 1
    _tidy({file.path.parent for file in files[:n_gone]})
    return files[n_gone:], files[:n_gone]


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of this user's under a temporary name, flush it to disk, rename it. Raises OSError."""
    name, file = _temporary(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            name.replace(path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, readable by this user only, and locked: `sweep` removes what is not."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:8]}.", suffix=_PART)
        file = os.fdopen(descriptor, "wb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return Path(name), file
        file.close()  # another process swept it away before it was locked


def sweep(root: Path) -> int:
    """Delete the unfinished files of processes that are no more. Returns how many. Raises OSError."""
    return sum(_discard_unlocked(path) for folder in identity_folders(root) for path in _unfinished(folder))


def shelves(root: Path) -> list[Shelf]:
    """The content of the folder, one entry for each identity, last used first. Raises OSError."""
    found = [_shelf(folder) for folder in identity_folders(root)]
    return sorted((shelf for shelf in found if shelf.n_files), key=lambda shelf: -shelf.used_ns)


def clear(root: Path) -> Cleared:
    """Delete all snapshots, and what dead processes left unfinished. Raises OSError if `root` cannot be read."""
    n_files, n_bytes, failures = 0, 0, []
    folders = identity_folders(root)
    for file in (file for folder in folders for file in kept_files(folder)):
        try:
            file.path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(f"{str(file.path)!r}: {error.strerror}")
        else:
            n_files, n_bytes = n_files + 1, n_bytes + file.n_bytes
    sweep(root)
    _tidy(folders)
    return Cleared(n_files, n_bytes, tuple(failures))


def _shelf(folder: Path) -> Shelf:
    identity = None
    with suppress(OSError, ValueError):
        identity = Identity.from_json((folder / IDENTITY_FILE).read_bytes())
    files = kept_files(folder)
    n_damaged = n_tokens = 0
    for kept in files:
        try:
            with opened(kept.path) as file:
                n_tokens += len(read_head(file).tokens)
        except (BadSnapshot, OSError):
            n_damaged += 1
    n_bytes = sum(file.n_bytes for file in files)
    return Shelf(folder, identity, len(files), n_damaged, n_tokens, n_bytes, files[-1].used_ns if files else 0)


def _unfinished(folder: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from [Path(entry.path) for entry in entries if _UNFINISHED.fullmatch(entry.name)]


def _discard_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:  # its writer lives, or finished it just now
        return False
    finally:
        os.close(descriptor)
    return True


def _tidy(folders: Iterable[Path]) -> None:
    """Remove those of the folders that hold nothing but their description."""
    for folder in folders:
        with suppress(OSError):
            if os.listdir(folder) in ([IDENTITY_FILE], []):  # noqa: PTH208
                (folder / IDENTITY_FILE).unlink(missing_ok=True)
                folder.rmdir()
