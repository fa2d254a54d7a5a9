"""A store in a temporary folder, a hub on 127.0.0.1, and small files that begin as GGUF does."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.store.store import Store
from tests.support.models.hub import Hub, serving


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    with serving(Hub(content=b"GGUF" + bytes(range(256)) * 4096)) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served
    close_session()
