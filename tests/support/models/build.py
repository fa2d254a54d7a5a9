"""Small models for tests: a folder with a manifest and a file, right or wrong in a chosen way."""

import hashlib
from pathlib import Path

from models.manifest import MANIFEST_FILE, Artefact, Manifest, dump_manifest

CONTENT = b"GGUF and then some weights"


def artefact(content: bytes = CONTENT, file: str = "tiny.gguf") -> Artefact:
    return Artefact(file=file, quantization="Q8_0", size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def manifest(name: str = "tiny", content: bytes = CONTENT) -> Manifest:
    return Manifest(name=name, description="A tiny model", licence="MIT", artefacts=(artefact(content),))


def fill(folder: Path, name: str = "tiny", content: bytes = CONTENT) -> None:
    (folder / "tiny.gguf").write_bytes(content)
    (folder / MANIFEST_FILE).write_text(dump_manifest(manifest(name, content)), encoding="utf-8")
