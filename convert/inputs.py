"""What a conversion is made of: from a command line to a base file, an adapter and the manifest to be written.

SOURCE is a recipe of the catalogue (which brings adapter and manifest along), or a checkpoint: a name in the store or
the catalogue, an hf:// address, a .gguf file. A base that is not on this disk yet is fetched.
"""

from dataclasses import dataclass
from pathlib import Path

from models.catalog import CatalogEntry, load_catalog
from models.errors import HashMismatch
from models.files import sha256_file
from models.gguf_meta import read_meta
from models.manifest import MANIFEST_FILE, Base, Manifest, read_manifest
from models.manifest import Adapter as AdapterRecord
from models.pull import pull
from models.store import Store, StoredModel, check_name

from .errors import AdapterInvalid, RequestInvalid
from .lora import Adapter, read_adapter
from .progress import Reporter
from .quantize import DEFAULT_QUANTIZATION, check_quantization


@dataclass(frozen=True)
class ConvertRequest:
    """What was asked for. A recipe needs no `name`; `keep_f16` keeps the unquantized file too.

    `hot` asks for the adapter alone, to be applied while its base is served; then nothing is quantized.
    """

    source: str
    name: str | None = None
    adapter: Path | None = None
    quantization: str | None = None
    manifest: Path | None = None
    replace: bool = False
    keep_f16: bool = False
    hot: bool = False


@dataclass(frozen=True)
class Inputs:
    """Everything found and checked. `manifest` is the one to be installed, its artefacts still missing."""

    gguf: Path
    adapter: Adapter | None
    quantization: str
    manifest: Manifest


def gather(request: ConvertRequest, store: Store, report: Reporter) -> Inputs:
    """Find and check what the request names. Raises RequestInvalid, AdapterInvalid and ModelErrors."""
    quantization = check_quantization(request.quantization or DEFAULT_QUANTIZATION)
    recipe = _recipe(request)
    if request.hot:
        _check_hot(request, recipe)
    if recipe is not None:
        return _from_recipe(request, recipe, quantization, store, report)
    if request.name is None:
        raise RequestInvalid(f"--name is missing: how is the model made from {request.source!r} to be called?")
    name = check_name(request.name)
    adapter = read_adapter(request.adapter) if request.adapter is not None else None
    given = read_manifest(request.manifest) if request.manifest is not None else None
    stored = _fetch(request.source, store, report)
    base = Base(name=stored.name, source=_origin(stored), sha256=_checked_sha256(stored, report))
    manifest = given or _inherited(stored, keeps_task=adapter is None)
    return Inputs(stored.gguf, adapter, quantization, _complete(manifest, name, base, adapter, hot=request.hot))


def _check_hot(request: ConvertRequest, recipe: CatalogEntry | None) -> None:
    if request.quantization is not None:
        message = "--hot leaves the base as it is and the adapter unquantized: leave out --quant, or --hot to merge"
        raise RequestInvalid(f"{message} (--quant is {request.quantization!r})")
    if request.keep_f16:
        raise RequestInvalid("--hot makes no F16 model that --keep-f16 could keep: leave out one of them")
    if request.adapter is None and recipe is None:
        raise RequestInvalid(f"--hot needs --adapter DIR: which adapter is to be applied to {request.source!r}?")


def _recipe(request: ConvertRequest) -> CatalogEntry | None:
    catalog = load_catalog()
    entry = catalog.get(request.source) if request.source in catalog.names() else None
    return entry if entry is not None and entry.recipe else None


def _from_recipe(
    request: ConvertRequest, entry: CatalogEntry, quantization: str, store: Store, report: Reporter
) -> Inputs:
    folder = entry.recipe_folder()
    recipe = read_manifest(request.manifest or folder / MANIFEST_FILE)
    if recipe.base is None or recipe.adapter is None:
        raise RequestInvalid(f"the recipe {request.source!r} needs a [base] and an [adapter] in its {MANIFEST_FILE}")
    adapter = read_adapter(request.adapter or folder / recipe.adapter.path)
    expected = recipe.adapter.sha256
    if request.adapter is None and expected not in {None, adapter.sha256}:
        raise AdapterInvalid(f"{str(adapter.folder)!r} has sha256 {adapter.sha256}, the recipe expects {expected}")
    stored = _fetch(recipe.base.name, store, report)
    found = _checked_sha256(stored, report)
    if found != recipe.base.sha256:
        raise HashMismatch(f"{str(stored.gguf)!r} has sha256 {found}, the recipe was made on {recipe.base.sha256}")
    base = recipe.base.model_copy(update={"source": recipe.base.source or _origin(stored)})
    manifest = _complete(recipe, check_name(request.name or recipe.name), base, adapter, hot=request.hot)
    if request.adapter is not None or request.hot or quantization != DEFAULT_QUANTIZATION:
        # the recipe's figures were measured on its own adapter at the default quantization
        manifest = manifest.model_copy(update={"quality": ()})
    return Inputs(stored.gguf, adapter, quantization, manifest)


def _fetch(source: str, store: Store, report: Reporter) -> StoredModel:
    catalog = load_catalog()
    if "://" in source or (source in catalog.names() and source not in store.names()):
        report.stage(f"fetch {source}")
        stored = pull(source, store, progress=report.advance, catalog=catalog)
    else:
        stored = store.resolve(source)
    if stored.manifest is not None and stored.manifest.kind == "adapter":
        raise RequestInvalid(f"{stored.name!r} is a LoRA adapter without weights of its own; convert its base instead")
    return stored


def _checked_sha256(stored: StoredModel, report: Reporter) -> str:
    report.stage(f"check {stored.gguf.name}")
    found = sha256_file(stored.gguf, report.advance)
    expected = stored.manifest.artefacts[0].sha256 if stored.manifest is not None else found
    if found != expected:
        raise HashMismatch(f"{str(stored.gguf)!r} has sha256 {found}, its {MANIFEST_FILE} says {expected}")
    return found


def _origin(stored: StoredModel) -> str:
    return stored.manifest.source if stored.manifest is not None else ""


def _inherited(stored: StoredModel, *, keeps_task: bool) -> Manifest:
    """Licence and notice come from the source; task, labels and prompt too, unless an adapter changes what it does."""
    if stored.manifest is None:
        return Manifest(name="source", licence=read_meta(stored.gguf).text("general.license") or "unknown")
    if keeps_task:
        return stored.manifest.model_copy(update={"quality": ()})
    return Manifest(name="source", licence=stored.manifest.licence, licence_notice=stored.manifest.licence_notice)


def _complete(manifest: Manifest, name: str, base: Base, adapter: Adapter | None, *, hot: bool) -> Manifest:
    made_with = manifest.adapter
    if adapter is not None:
        made_with = AdapterRecord(path=adapter.folder.name, sha256=adapter.sha256, rank=adapter.rank)
    kind = "adapter" if hot else "model"
    changes = {"kind": kind, "name": name, "source": "", "base": base, "adapter": made_with, "artefacts": ()}
    return manifest.model_copy(update=changes)
