"""The origin of the weights: SOURCE resolved, fetched if it is not on this disk, and identified by its sha256.

SOURCE is a name in the store or the catalogue, an hf:// address of a GGUF file or of a checkpoint, a .gguf file, or a
Hugging Face folder. With `--gguf FILE` the weights come from another converter, and SOURCE only from its tokenizer.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from convert.errors import RequestInvalid, SourceInvalid
from models.common.console import Reporter
from models.common.files import sha256_file
from models.errors import HashMismatch
from models.gguf.header import read_meta
from models.manifest import MANIFEST_FILE, Base, Manifest
from models.store.catalog import load_catalog, parse_repo
from models.store.hub import fetch_checkpoint
from models.store.pull import pull
from models.store.store import Store, StoredModel

# The files that identify a folder: the weights, and all that decides their conversion.
_HASHED = (".safetensors", ".json", ".model", ".jinja")


@dataclass(frozen=True)
class Origin:
    """Weights to convert: a GGUF file or a Hugging Face folder.

    `folder` holds the tokenizer that a converted vocabulary is compared with (None: a GGUF file, which has its own).
    `digest` is the sha256; a folder's is computed in a thread. `manifest` is that of an installed model.
    """

    path: Path
    folder: Path | None
    name: str
    digest: Future[str]
    source: str = ""
    revision: str = ""
    manifest: Manifest | None = None

    @property
    def base(self) -> Base:
        """The manifest's entry for the weights. Waits for `digest`; raises SourceInvalid when they cannot be read."""
        try:
            sha256 = self.digest.result()
        except OSError as error:
            raise SourceInvalid(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error
        return Base(name=self.name, source=self.source, revision=self.revision, sha256=sha256)

    @property
    def licence(self) -> str:
        """The licence in the file's own metadata, for weights without a manifest."""
        return (read_meta(self.path).text("general.license") if self.path.is_file() else "") or "unknown"


def find_origin(source: str, gguf: Path | None, store: Store, report: Reporter) -> Origin:
    """Find or fetch SOURCE. Raises RequestInvalid, HashMismatch and what the store and the Hub raise."""
    if gguf is not None:
        return _made_elsewhere(source, gguf, report)
    repo, path = parse_repo(source), Path(source).expanduser()
    if repo is not None:
        report.stage(f"fetch {source}")
        folder = fetch_checkpoint(repo, report.advance)
        name, address = repo.repo.rpartition("/")[2], f"hf://{repo.repo}@{folder.name}"
        return Origin(folder, folder, name, folder_digest(folder), source=address, revision=folder.name)
    if path.is_dir() and not (path / MANIFEST_FILE).is_file():
        return Origin(path, path, path.resolve().name, folder_digest(path))
    stored = _stored(source, store, report)
    came_from = stored.manifest.source if stored.manifest is not None else ""
    digest = _known(checked_sha256(stored, report))
    return Origin(stored.gguf, None, stored.name, digest, source=came_from, manifest=stored.manifest)


def checked_sha256(stored: StoredModel, report: Reporter) -> str:
    """The sha256 of the model's file. Raises HashMismatch when it differs from the manifest's."""
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
    return Origin(gguf, folder, folder.resolve().name, _known(sha256_file(gguf, report.advance)))


def folder_digest(folder: Path) -> Future[str]:
    """One hash for a checkpoint's folder, over the names and sha256 of its files in order of name.

    A thread computes it while the weights are converted: only the manifest needs it.
    """
    digest = Future[str]()
    Thread(target=_settle, args=(digest, folder), daemon=True).start()
    return digest


def _settle(digest: Future[str], folder: Path) -> None:
    total = hashlib.sha256()
    try:
        for path in _hashed(folder):
            total.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
        digest.set_result(total.hexdigest())
    except OSError as error:
        digest.set_exception(error)


def _known(sha256: str) -> Future[str]:
    digest = Future[str]()
    digest.set_result(sha256)
    return digest


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
