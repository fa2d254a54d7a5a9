"""Where the weights come from: what SOURCE means, fetched if it is not on this disk, and known by its sha256.

A name in the store or the catalogue, an hf:// address of a GGUF file or of a whole checkpoint, a .gguf file, or a
Hugging Face folder. `--gguf FILE` brings weights that were made elsewhere: SOURCE then gives the tokenizer to compare.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.catalog import load_catalog
from models.download_checkpoint import fetch_checkpoint
from models.errors import HashMismatch
from models.files import sha256_file
from models.gguf_meta import read_meta
from models.manifest import MANIFEST_FILE, Base, Manifest
from models.pull import pull
from models.sources import parse_repo
from models.store import Store, StoredModel

from .errors import RequestInvalid
from .progress import Reporter

# What a folder is known by: the weights, and all that decides what becomes of them.
_HASHED = (".safetensors", ".json", ".model", ".jinja")


@dataclass(frozen=True)
class Origin:
    """Weights to convert: a GGUF file or a Hugging Face folder.

    `folder` holds the tokenizer that a converted vocabulary is compared with (None: a GGUF file, which has its own).
    `manifest` is that of an installed model.
    """

    path: Path
    folder: Path | None
    base: Base
    manifest: Manifest | None = None

    @property
    def licence(self) -> str:
        """What the weights' own metadata say, for a file that nobody described."""
        return (read_meta(self.path).text("general.license") if self.path.is_file() else "") or "unknown"


def find_origin(source: str, gguf: Path | None, store: Store, report: Reporter) -> Origin:
    """Find or fetch SOURCE. Raises RequestInvalid, HashMismatch and what the store and the Hub raise."""
    if gguf is not None:
        return _made_elsewhere(source, gguf, report)
    repo, path = parse_repo(source), Path(source).expanduser()
    if repo is not None:
        report.stage(f"fetch {source}")
        folder = fetch_checkpoint(repo, report.advance)
        return _folder(folder, repo.repo.rpartition("/")[2], f"hf://{repo.repo}@{folder.name}", report)
    if path.is_dir() and not (path / MANIFEST_FILE).is_file():
        return _folder(path, path.resolve().name, "", report)
    stored = _stored(source, store, report)
    came_from = stored.manifest.source if stored.manifest is not None else ""
    sha256 = checked_sha256(stored, report)
    return Origin(stored.gguf, None, Base(name=stored.name, source=came_from, sha256=sha256), stored.manifest)


def checked_sha256(stored: StoredModel, report: Reporter) -> str:
    """The sha256 of the model's file. Raises HashMismatch when its manifest says another."""
    report.stage(f"check {stored.gguf.name}")
    found = sha256_file(stored.gguf, report.advance)
    expected = stored.manifest.artefacts[0].sha256 if stored.manifest is not None else found
    if found != expected:
        raise HashMismatch(f"{str(stored.gguf)!r} has sha256 {found}, its {MANIFEST_FILE} says {expected}")
    return found


def _made_elsewhere(source: str, gguf: Path, report: Reporter) -> Origin:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise RequestInvalid(
            f"with --gguf SOURCE is the folder {gguf.name!r} was made from, for its tokenizer: {source!r} is none. "
            f"To convert a GGUF file alone, give it as SOURCE"
        )
    if not gguf.is_file():
        raise RequestInvalid(f"--gguf {str(gguf)!r}: there is no such file")
    report.stage(f"check {gguf.name}")
    base = Base(name=folder.resolve().name, sha256=sha256_file(gguf, report.advance))
    return Origin(gguf, folder, base)


def _folder(folder: Path, name: str, source: str, report: Reporter) -> Origin:
    report.stage(f"check {name}")
    revision = source.rpartition("@")[2] if source else ""
    sha256 = folder_sha256(folder, report)
    return Origin(folder, folder, Base(name=name, source=source, revision=revision, sha256=sha256))


def folder_sha256(folder: Path, report: Reporter) -> str:
    """One hash for a checkpoint's folder: over the names and sha256 of its files in order of name."""
    digest, done = hashlib.sha256(), 0
    files = list(_hashed(folder))
    total = sum(path.stat().st_size for path in files)
    for path in files:
        report.advance(done, total)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
        done += path.stat().st_size
    return digest.hexdigest()


def _hashed(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _HASHED:
            yield path


def _stored(source: str, store: Store, report: Reporter) -> StoredModel:
    catalog = load_catalog()
    if "://" in source or (source in catalog.names() and source not in store.names()):
        report.stage(f"fetch {source}")
        stored = pull(source, store, progress=report.advance, catalog=catalog)
    else:
        stored = store.resolve(source)
    if stored.manifest is not None and stored.manifest.kind == "adapter":
        raise RequestInvalid(f"{stored.name!r} is a LoRA adapter without weights of its own; convert its base instead")
    return stored
