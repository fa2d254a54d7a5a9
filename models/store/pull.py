"""Install a model by its catalogue name, its address on the Hub, or its path on this disk."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.card.card import render_card
from models.common.files import Progress, check_free, copy_files, sha256_file, write_atomic
from models.errors import DownloadFailed, HashMismatch, ModelError, ModelNotFound, StoreError
from models.gguf.header import has_chat_template, is_gguf, read_meta
from models.manifest import MANIFEST_FILE, Artefact, Manifest, dump_manifest

from .catalog import Catalog, CatalogEntry, HubFile, load_catalog, parse_source
from .hub import fetch, look_up
from .store import Store, StoredModel, check_name, wrong_path

Build = Callable[[CatalogEntry, Store], StoredModel]
"""Builds a catalogue entry that is a recipe and installs it. The caller passes it: `models` cannot convert."""

_QUANTIZATION = re.compile(r"(?<![A-Za-z0-9])(I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4|BF16|F16|F32)(?![A-Za-z0-9])", re.I)


@dataclass(frozen=True)
class _Download:
    """A file to fetch, and its manifest's fields. Some sources do not give the hash in advance."""

    name: str
    description: str
    licence: str
    licence_notice: str
    file: str
    quantization: str
    size_bytes: int | None
    sha256: str | None
    sources: tuple[str, ...]
    hint: str = ""


def pull(
    name_or_uri: str,
    store: Store,
    *,
    progress: Progress | None = None,
    name: str | None = None,
    catalog: Catalog | None = None,
    build: Build | None = None,
) -> StoredModel:
    """Install a model from the catalogue, or any GGUF file by its path or hf:// address; return it if it is installed.

    `build` builds a recipe's model, or rebuilds it if the recipe has changed. `name` names a file's model; by default
    the name is derived from the file's. Raises ModelNotFound, DownloadFailed (naming every source and why it failed),
    HashMismatch, StoreError.
    """
    if "://" in name_or_uri:
        source = parse_source(name_or_uri)
        if not isinstance(source, HubFile):
            raise DownloadFailed(f"{name_or_uri!r} cannot be pulled by address; use hf://owner/name/file.gguf@revision")
        target = name if name is not None else name_of(source.path)
        with store.exclusive(target):
            return _installed_from(store, target, source) or _install(_on_hub(target, source), store, progress)
    known = catalog if catalog is not None else load_catalog()
    path = Path(name_or_uri).expanduser()
    if name_or_uri not in {*known.names(), *store.names()} and path.is_file():
        return _install_file(path, name if name is not None else name_of(path.name), store, progress)
    if "/" in name_or_uri:
        whole = f"{name_or_uri!r} is a model's folder; it can be served as it is: deskside serve {name_or_uri}"
        raise ModelNotFound(whole if (path / MANIFEST_FILE).is_file() else wrong_path(name_or_uri))
    target = check_name(name_or_uri)
    if name is not None and name != target:
        raise StoreError(f"--name {name!r} is for files and hf:// addresses; {target!r} keeps its name")
    with store.exclusive(target):
        is_recipe = target in known.names() and known.get(target).recipe != ""
        if target in store.names() and not (is_recipe and build is not None):
            return store.get(target)
        entry = known.get(target)
        if not is_recipe:
            return _install(_in_catalog(entry), store, progress)
    if build is None:
        raise StoreError(f"{target!r} is built, not downloaded; run: deskside convert {target}")
    return build(entry, store)


def name_of(path: str) -> str:
    """The name in the store of a model file: its own, in lower case, with dashes for other characters."""
    return check_name(re.sub(r"[^a-z0-9._-]+", "-", PurePosixPath(path).stem.lower()).strip("-._")[:64])


def _install_file(path: Path, name: str, store: Store, progress: Progress | None) -> StoredModel:
    """Install a copy of a GGUF file of this disk, as it is. Raises DownloadFailed, BadGguf or StoreError."""
    if not is_gguf(path):
        raise DownloadFailed(wrong_path(str(path)))
    meta = read_meta(path)
    if meta.is_adapter:
        raise DownloadFailed(f"{str(path)!r} is a LoRA adapter and no model; to apply it: deskside convert --hot")
    with store.exclusive(name):
        if name in store.names():
            stored = store.get(name)
            if stored.manifest is not None and stored.manifest.artefacts[0].sha256 == sha256_file(path, progress):
                return stored
        check_free(store.home if store.home.is_dir() else path.parent, path.stat().st_size)
        with store.staging(name) as folder:
            file = folder / f"{name}.gguf"
            sha256 = copy_files([path], file, progress)
            found = _QUANTIZATION.search(path.stem)
            manifest = Manifest(
                name=name,
                description=meta.text("general.name") or path.name,
                licence=meta.text("general.license") or "as stated by its publisher",
                artefacts=(
                    Artefact(
                        file=file.name,
                        quantization=found[0].upper() if found else "unknown",
                        size_bytes=file.stat().st_size,
                        sha256=sha256,
                    ),
                ),
            )
            write_atomic(folder / MANIFEST_FILE, dump_manifest(manifest))
            write_atomic(folder / "README.md", render_card(manifest, chats=has_chat_template(file)))
    return store.get(name)


def _installed_from(store: Store, name: str, source: HubFile) -> StoredModel | None:
    if name not in store.names():
        return None
    stored = store.get(name)
    came_from = stored.manifest.source if stored.manifest is not None else ""
    if came_from.rpartition("@")[0] != str(source).rpartition("@")[0]:
        raise StoreError(f"{name!r} is installed from {came_from or 'elsewhere'!r}; choose another name with --name")
    return stored


def _in_catalog(entry: CatalogEntry) -> _Download:
    kept = {"name", "description", "licence", "licence_notice", "hint"}
    artefact = entry.artefact()
    return _Download(**entry.model_dump(include=kept), **artefact.model_dump(), sources=entry.sources)


def _on_hub(name: str, source: HubFile) -> _Download:
    facts = look_up(source)
    found = _QUANTIZATION.search(PurePosixPath(source.path).stem)
    return _Download(
        name=name,
        description=f"{PurePosixPath(source.path).name} from {source.repo}",
        licence=f"as stated by its publisher, {source.repo}",
        licence_notice="",
        file=PurePosixPath(source.path).name,
        quantization=found[0].upper() if found else "unknown",
        size_bytes=facts.size_bytes,
        sha256=facts.sha256,
        sources=(str(HubFile(source.repo, source.path, facts.commit)),),
    )


def _install(download: _Download, store: Store, progress: Progress | None) -> StoredModel:
    with store.staging(download.name) as folder:
        file = folder / download.file
        source = _fetch_first(download, file, progress)
        with file.open("rb") as opened:
            if (magic := opened.read(4)) != b"GGUF":
                raise DownloadFailed(f"{source} is not a GGUF file: it starts with {magic!r}")
        manifest = _manifest(download, file, source)
        write_atomic(folder / MANIFEST_FILE, dump_manifest(manifest))
        write_atomic(folder / "README.md", render_card(manifest, chats=has_chat_template(file)))
    return store.get(download.name)


def _fetch_first(download: _Download, file: Path, progress: Progress | None) -> str:
    failures: list[ModelError] = []
    for source in download.sources:
        try:
            fetch(source, file, sha256=download.sha256, size_bytes=download.size_bytes, progress=progress)
        except (DownloadFailed, HashMismatch) as error:
            failures.append(error)
        else:
            return source
    reasons = "".join(f"\n  - {error}" for error in failures)
    kind = HashMismatch if all(isinstance(error, HashMismatch) for error in failures) else DownloadFailed
    raise kind(f"no source delivered {download.name!r}:{reasons}" + (f"\n{download.hint}" if download.hint else ""))


def _manifest(download: _Download, file: Path, source: str) -> Manifest:
    artefact = Artefact(
        file=download.file,
        quantization=download.quantization,
        size_bytes=file.stat().st_size,
        sha256=download.sha256 or sha256_file(file),
    )
    return Manifest(
        name=download.name,
        description=download.description,
        licence=download.licence,
        licence_notice=download.licence_notice,
        source=source,
        artefacts=(artefact,),
    )
