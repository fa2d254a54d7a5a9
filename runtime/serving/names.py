"""Names on the command line: an installed model, a file, or BASE:ADAPTER, a LoRA adapter on its base."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.common.files import sha256_file
from models.errors import BadManifest, HashMismatch
from models.gguf.header import read_meta
from models.manifest import Manifest
from models.store.store import Store, StoredModel
from runtime.errors import LoadFailed

_log = logging.getLogger("deskside.models")


@dataclass(frozen=True)
class ModelRef:
    """A model to serve under the name `id`: `base`, with `adapter` applied if there is one.

    `template` is the adapter's own chat template, if it has one.
    """

    id: str
    base: StoredModel
    adapter: StoredModel | None = None
    template: str | None = None

    @property
    def adapters(self) -> Mapping[str, Path]:
        """The adapter to load with the base: its name -> its LoRA GGUF file."""
        return {self.adapter.name: self.adapter.gguf} if self.adapter is not None else {}

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of what answers: the adapter's, if there is one."""
        return (self.adapter or self.base).manifest

    def digest(self) -> str:
        """A hash in hex of the files that answer, read from the disk: the name stays when a model is replaced."""
        hashes = [sha256_file(stored.gguf) for stored in (self.base, self.adapter) if stored is not None]
        return hashlib.sha256("-".join(hashes).encode()).hexdigest()[:16]


def find(name: str, store: Store) -> ModelRef:
    """Look up NAME, PATH, or BASE:ADAPTER, where BASE is either and ADAPTER is installed.

    Raises ModelNotFound, BadManifest, BadGguf, HashMismatch (the adapter is for other weights) or LoadFailed (an
    adapter alone).
    """
    base_name, colon, adapter_name = name.rpartition(":")
    if not colon or not base_name or Path(name).exists():
        stored = store.resolve(name)
        require_weights(stored)
        return ModelRef(stored.name, stored)
    base, adapter = store.resolve(base_name), store.get(adapter_name)
    require_weights(base)
    if adapter.manifest is None or adapter.manifest.kind != "adapter":
        raise LoadFailed(f"{adapter_name!r} in {name!r} is a model of its own, no adapter; serve it as {adapter_name}")
    meta = read_meta(adapter.gguf)
    if not meta.is_adapter or meta.text("adapter.type") != "lora":
        kind = f"{meta.text('general.type')!r} {meta.text('adapter.type')!r}"
        raise BadManifest(f"{str(adapter.gguf)!r} is no LoRA adapter: general.type and adapter.type are {kind}")
    _require_base(adapter, adapter.manifest, base)
    return ModelRef(f"{base.name}:{adapter.name}", base, adapter, meta.text("tokenizer.chat_template") or None)


def require_weights(stored: StoredModel) -> None:
    """Raise LoadFailed for an adapter, which holds no model by itself."""
    manifest = stored.manifest
    if manifest is not None and manifest.kind == "adapter":
        base = manifest.base.name if manifest.base is not None else "BASE"
        raise LoadFailed(f"{stored.name!r} is a LoRA adapter and runs on its base only; name it {base}:{stored.name}")


def _require_base(adapter: StoredModel, manifest: Manifest, base: StoredModel) -> None:
    """Raise HashMismatch unless `base` holds the weights that the adapter was trained on, by hash or by name."""
    assert manifest.base is not None, "read_manifest lets no adapter without a base pass"
    wanted = manifest.base
    held = _weights(base)
    if wanted.sha256 in held:
        return
    told = f"{adapter.name!r} was trained on {wanted.name!r} (sha256 {wanted.sha256[:12]}…)"
    has = f"{base.name!r} is {' from '.join(sha256[:12] + '…' for sha256 in held)}"
    if base.manifest is None or base.name != wanted.name:
        raise HashMismatch(f"{told}, but {has}: an adapter fits its own base only")
    _log.warning("%s, but %s: the same model in another form, it seems; measure what that costs", told, has)


def _weights(base: StoredModel) -> list[str]:
    """The sha256 of the file, and of its source if the conversion merged nothing."""
    manifest = base.manifest
    if manifest is None:
        return [sha256_file(base.gguf)]
    source = [manifest.base.sha256] if manifest.base is not None and manifest.adapter is None else []
    return [manifest.artefacts[0].sha256, *source]
