"""The models on disk: a name or a path becomes a verified local file; installing is all or nothing.

<home>/models/<name>/    model.toml, *.gguf, README.md: complete models only
<home>/previous/<name>/  the model that was replaced, for `deskside rollback`
<home>/staging/<id>/     models in the making, each held by the lock file <id>.lock of a living process
<home>/staging/.lock     held while folders are renamed
"""

import re
import shlex
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from models.common.file_kinds import file_kind
from models.common.files import Progress, default_home, discard, sha256_file, sync
from models.errors import BadManifest, HashMismatch, ModelError, ModelNotFound, StoreError, did_you_mean, nearest
from models.gguf.header import is_gguf
from models.manifest import MANIFEST_FILE, Artefact, Manifest, read_manifest

from .catalog import load_catalog
from .previous import Versions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def wrong_path(given: str) -> str:
    """Say what lies at a path that is no model, with the command for it; empty if `given` looks like a name."""
    path, quoted = Path(given).expanduser(), shlex.quote(given)
    if "://" in given:
        verb = "pull" if given.partition("@")[0].lower().endswith(".gguf") else "convert"
        return f"{given!r} is an address, not an installed model; try: deskside {verb} {quoted}"
    found = file_kind(path)
    if found.kind == "folder":
        return f"{given!r} is a folder {_folder_without_model(path, quoted)}"
    if found.kind != "missing":
        whole = (path.parent / "config.json").is_file()
        return f"{given!r} is {found.name}, not a GGUF file" + (
            f"; to make a model of its checkpoint: deskside convert {shlex.quote(str(path.parent))}" if whole else ""
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and given[0] not in ".~" and not given.lower().endswith(".gguf"):
        return f"there is no file or folder {given!r}; for a model of the Hub: deskside convert hf://{given}"
    if "/" in given or given.lower().endswith(".gguf"):
        return f"there is no file or folder {given!r}"
    return ""


def _folder_without_model(folder: Path, quoted: str) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"with a LoRA adapter; to make a model of it: deskside convert BASE --adapter {quoted}"
    if (folder / "config.json").is_file():
        return f"with a checkpoint; to make a model of it: deskside convert {quoted}"
    if names := sorted(path.name for path in folder.glob("*.gguf"))[:3]:
        return f"without {MANIFEST_FILE}; give its file: {', '.join(names)}"
    return f"without {MANIFEST_FILE} and GGUF file"


def check_name(name: str) -> str:
    """Return `name` if it is a valid model name, which cannot lead out of the store. Raises StoreError."""
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"{name!r} is not a model name: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', the first a letter or a digit"
        )
    return name


@dataclass(frozen=True)
class StoredModel:
    """A model on this disk. `gguf` is the file to load; a bare GGUF file has no manifest and its stem as name."""

    name: str
    folder: Path
    manifest: Manifest | None
    gguf: Path


class Store:
    """The folder of installed models. Any number of processes may use it at once."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home if home is not None else default_home()
        self._models = self.home / "models"
        self._staging = self.home / "staging"
        self._versions = Versions(self.home)

    def names(self) -> list[str]:
        """The names of the installed models, sorted."""
        for name in self._versions.names():
            self._settle(name)
        if not self._models.is_dir():
            return []
        return sorted(path.name for path in self._models.iterdir() if (path / MANIFEST_FILE).is_file())

    def get(self, name: str) -> StoredModel:
        """The installed model of that name. Raises ModelNotFound, BadManifest, StoreError (not a name)."""
        folder = self._models / check_name(name)
        self._settle(name)
        if not (folder / MANIFEST_FILE).is_file():
            raise ModelNotFound(f"no model named {name!r} is installed; {self._installed()}{self._way_to(name)}")
        stored = _open_folder(folder)
        if stored.name != name:
            raise BadManifest(
                f"{str(folder / MANIFEST_FILE)!r} names the model {stored.name!r}; rename the folder back"
            )
        return stored

    def resolve(self, name_or_path: str | Path) -> StoredModel:
        """An installed model's name, a model's folder, or a .gguf file. Hashes are not read; sizes are checked.

        Raises ModelNotFound naming what is installed, BadManifest when the folder contradicts its manifest.
        """
        text = str(name_or_path)
        if _NAME.fullmatch(text):
            self._settle(text)
            if (self._models / text / MANIFEST_FILE).is_file():
                return self.get(text)
        path = Path(name_or_path).expanduser()
        if path.is_file() and (path.suffix.lower() == ".gguf" or is_gguf(path)):
            return StoredModel(path.stem, path.parent, None, path)
        if (path / MANIFEST_FILE).is_file():
            return _open_folder(path)
        if found := wrong_path(text):
            raise ModelNotFound(f"{found}; {self._installed()}")
        raise ModelNotFound(f"no model named {text!r} is installed; {self._installed()}{self._way_to(text)}")

    @contextmanager
    def staging(self, name: str, *, replace: bool = False, read_back: Collection[str] = frozenset()) -> Iterator[Path]:
        """A temporary folder to build the model `name` in; leaving the block installs it.

        On leaving, `model.toml` is read, each artefact's size and sha256 are verified, everything is flushed to disk
        and renamed into place at once; a model that it replaces is kept for `rollback`, in place of one kept before.
        Artefacts named in `read_back` by then are not hashed again: the caller has done so. When the block raises
        (KeyboardInterrupt included), the folder is removed.
        Raises StoreError (name taken and not `replace`, or not a name), BadManifest, HashMismatch.
        """
        target = self._models / check_name(name)
        self._require_other_letters(name)
        if target.exists() and not replace:
            raise _taken(name)
        with self._staged_folder(name) as folder:
            yield folder
            self._check_staged(name, folder, read_back)
            with self._renaming():
                self._install(folder, target, replace=replace)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Lock `name` while it is fetched or built: a second process waits for the first."""
        self._prepare()
        with FileLock(self._staging / f"{check_name(name)}.pull.lock"):
            yield

    def verify(self, name: str, progress: Progress | None = None) -> None:
        """Hash every artefact of the model. Raises HashMismatch naming the file and both hashes."""
        stored = self.get(name)
        for artefact in stored.manifest.artefacts if stored.manifest is not None else ():
            _check_hash(
                stored.folder / artefact.file,
                artefact,
                progress,
                fix=f"; fix: deskside models remove {name}, then install it again",
            )

    def remove(self, name: str) -> bool:
        """Delete the model, and the one that it replaced, if that is kept: True then.

        The name is free at once, even when deleting the files takes a while.
        """
        folder = self._models / check_name(name)
        self._settle(name)
        if not folder.exists() and not folder.is_symlink():
            near = did_you_mean(name, self.names())
            raise ModelNotFound(f"no model named {name!r} is installed; {self._installed()}{near}")
        with self._staged_folder(name) as trash, self._renaming():
            self._versions.drop_previous(name, trash / "previous")
            folder.rename(trash / "installed")
            return (trash / "previous").exists()

    def previous(self, name: str) -> StoredModel | None:
        """The model that `name` replaced, if it is kept and whole."""
        self._settle(check_name(name))
        try:
            return _open_folder(self._versions.previous(name))
        except ModelError:
            return None

    def rollback(self, name: str) -> StoredModel:
        """Swap the model with the one that it replaced, and return the one installed now. Twice changes nothing.

        Raises ModelNotFound when one of the two is missing, BadManifest when the replaced one is damaged, StoreError.
        """
        self._settle(check_name(name))
        if not self._versions.installed(name).exists():
            near = did_you_mean(name, self.names())
            raise ModelNotFound(f"no model named {name!r} is installed; {self._installed()}{near}")
        if not self._versions.previous(name).exists():
            raise ModelNotFound(
                f"there is nothing to roll {name!r} back to: it has replaced no model. One is kept when `deskside "
                "finetune` or `deskside convert --replace` installs another under its name"
            )
        _open_folder(self._versions.previous(name))
        with self._renaming():
            self._versions.exchange(name)
        sync(self._models)
        return self.get(name)

    def _settle(self, name: str) -> None:
        """Bring an exchange of folders that a kill has interrupted to its end; wait for one in another process."""
        if not self._versions.is_settled(name):
            with self._renaming():
                self._versions.settle(name)

    def _require_other_letters(self, name: str) -> None:
        """Raise StoreError if an installed name differs in capitals only: some file systems take both for one."""
        for other in self.names():
            if other != name and other.lower() == name.lower():
                raise StoreError(f"{name!r} differs from the installed {other!r} in capitals only; choose another name")

    def _installed(self) -> str:
        names = self.names()
        return f"installed: {', '.join(names)}" if names else "no model is installed"

    def _way_to(self, name: str) -> str:
        """The command that installs `name`, or the name that was meant, as the end of a message."""
        known = load_catalog().names()
        if name in known:
            return f"; try: deskside pull {name}"
        near = nearest(name, [*self.names(), *known])
        if near is None:
            return f"; the catalogue has {', '.join(known)} (deskside pull NAME)"
        return f"; did you mean {near!r}?" + ("" if near in self.names() else f" (deskside pull {near})")

    def _prepare(self) -> None:
        try:
            self._models.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"the store {str(self.home)!r} cannot be written: {error}; set DESKSIDE_HOME")

    @contextmanager
    def _renaming(self) -> Iterator[None]:
        self._prepare()
        try:
            with FileLock(self._staging / ".lock"):
                yield
        except OSError as error:
            raise self._unwritable(error) from error

    @contextmanager
    def _staged_folder(self, name: str) -> Iterator[Path]:
        """Make a folder in staging for the block; the lock file beside it shows that this process still uses it."""
        folder = self._staging / f"{name}.{uuid.uuid4().hex[:12]}"
        alive = FileLock(_lock_of(folder))
        with self._renaming():
            self._sweep()
            alive.acquire()
            folder.mkdir()
        try:
            yield folder
        finally:
            discard(folder)
            alive.release()
            discard(_lock_of(folder))

    def _sweep(self) -> None:
        """Remove the leftovers of dead processes from staging."""
        for folder in self._staging.iterdir():
            if not folder.is_dir():
                continue
            lock = FileLock(_lock_of(folder))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            discard(folder)
            lock.release()
            discard(_lock_of(folder))

    def _check_staged(self, name: str, folder: Path, read_back: Collection[str]) -> None:
        manifest = read_manifest(folder)
        if manifest.name != name:
            raise BadManifest(f"model.toml names the model {manifest.name!r}, it is to be installed as {name!r}")
        if not manifest.artefacts:
            raise BadManifest(f"model.toml of {name!r} lists no artefact: nothing could be served")
        for artefact in manifest.artefacts:
            file = folder / artefact.file
            _check_size(file, artefact)
            if artefact.file not in read_back:
                _check_hash(file, artefact)
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)

    def _install(self, folder: Path, target: Path, *, replace: bool) -> None:
        self._versions.settle(target.name)
        if target.exists() and not replace:
            raise _taken(target.name)
        self._versions.install(folder, target.name, keep=_is_worth_keeping(target, folder))
        sync(self._models)


def _is_worth_keeping(replaced: Path, new: Path) -> bool:
    """False for a damaged model, and for one with the very files of the new one."""
    try:
        manifest = _open_folder(replaced).manifest
    except ModelError:
        return False
    return manifest is not None and manifest.artefacts != read_manifest(new).artefacts


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _taken(name: str) -> StoreError:
    return StoreError(
        f"a model named {name!r} is installed already; remove it (deskside models remove {name}), "
        "replace it (--replace) or choose another name"
    )


def _open_folder(folder: Path) -> StoredModel:
    manifest = read_manifest(folder)
    if not manifest.artefacts:
        raise ModelNotFound(
            f"{str(folder)!r} holds a recipe that is not built yet; try: deskside convert {manifest.name}"
        )
    for artefact in manifest.artefacts:
        _check_size(folder / artefact.file, artefact)
    return StoredModel(manifest.name, folder, manifest, folder / manifest.artefacts[0].file)


def _check_size(file: Path, artefact: Artefact) -> None:
    if not file.is_file():
        raise BadManifest(f"model.toml lists {artefact.file!r}, but there is no such file in {str(file.parent)!r}")
    if (size_bytes := file.stat().st_size) != artefact.size_bytes:
        raise BadManifest(f"{str(file)!r} has {size_bytes} bytes, model.toml says {artefact.size_bytes}")


def _check_hash(file: Path, artefact: Artefact, progress: Progress | None = None, *, fix: str = "") -> None:
    found = sha256_file(file, progress)
    if found != artefact.sha256:
        raise HashMismatch(f"{str(file)!r} has sha256 {found}, model.toml says {artefact.sha256}{fix}")
