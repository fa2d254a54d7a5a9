"""Atomic writes, hashes, room on the disk, and the folder of all that Deskside keeps."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from platformdirs import user_data_path

from models.errors import StoreError

CHUNK_BYTES = 1 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Weights in these files are pickles, which run code when they are opened: Deskside never opens one."""
# Space kept free beside a model, for its manifest and card and for other programs.
MARGIN_BYTES = 16 << 20

Progress = Callable[[int, int | None], None]
"""Called with the bytes done so far and the total in bytes (None when it is not known)."""


def default_home() -> Path:
    """`$DESKSIDE_HOME`, else the platform's folder for user data."""
    chosen = os.environ.get("DESKSIDE_HOME")
    return Path(chosen).expanduser() if chosen else user_data_path("deskside", appauthor=False)


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """The file's sha256 as 64 lower-case hex digits, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    done, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def copy_files(sources: Sequence[Path], target: Path, progress: Progress | None = None) -> str:
    """Write the content of `sources`, one after another, to `target` and return its sha256, in chunks of 1 MiB."""
    digest, done, total = hashlib.sha256(), 0, sum(source.stat().st_size for source in sources)
    with target.open("wb") as written:
        for source in sources:
            with source.open("rb") as read:
                while chunk := read.read(CHUNK_BYTES):
                    written.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
    return digest.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, flush to disk, rename: a reader sees the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(folder: Path, needed_bytes: int) -> None:
    """Raise StoreError when the disk under `folder` has less than `needed_bytes` and a margin of 16 MiB free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + MARGIN_BYTES:
        raise StoreError(
            f"{needed_bytes + MARGIN_BYTES} bytes are needed under {str(folder)!r}, {free_bytes} are free; "
            "make room, or set DESKSIDE_HOME to a folder on a larger disk"
        )


def discard(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder; nothing happens when it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
