"""The identity of what computes: snapshots of one are never read by another."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from models.common.files import sha256_file, write_atomic

from .snapshot_file import VERSION


@dataclass(frozen=True, slots=True)
class Identity:
    """A model's file by its SHA-256, the release of the library, and the settings that move bits of what it computes.

    `model` is the name that people read; it is no part of the identity.
    """

    model: str
    sha256: str
    library: str
    computing: str

    @property
    def digest(self) -> bytes:
        """32 bytes, other ones for each identity and each format of snapshots."""
        parts = (str(VERSION), self.sha256, self.library, self.computing)
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    def to_json(self) -> bytes:
        """The identity as a file."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Identity":
        """The identity in such a file. Raises ValueError."""
        try:
            return cls(**{name: str(value) for name, value in json.loads(text).items()})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"no identity: {error}") from error


class FileHashes:
    """The SHA-256 of files outside the store, each read once: kept in `folder` until the file changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sha256(self, path: Path) -> str:
        """The file's SHA-256 in hex. Raises OSError if it cannot be read."""
        place = self._place(path)
        try:
            known = place.read_text(encoding="ascii").strip()
            if len(bytes.fromhex(known)) == hashlib.sha256().digest_size:
                return known
        except (OSError, ValueError):
            pass
        found = sha256_file(path)
        if self._place(path) == place:  # else it changed meanwhile
            self._keep(place, found)
        return found

    def _keep(self, place: Path, found: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(place, found + "\n")
        except OSError:
            return

    def _place(self, path: Path) -> Path:
        """The file of the hash: its name follows from everything that changes with the content."""
        state = path.stat()
        facts = (path.resolve(), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        return self._folder / hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:32]
