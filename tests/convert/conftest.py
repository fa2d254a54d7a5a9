"""How conversion's child processes are started: forked with everything imported, unless a test is about the start."""

from collections.abc import Iterator

import pytest

from convert.child import start_python
from tests.support.convert.forked import Forked


@pytest.fixture(scope="module", autouse=True)
def forked_children() -> Iterator[None]:
    """Children begin their work at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.child.start_python", Forked)
        yield


@pytest.fixture
def fresh_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children are new interpreters, as users have them."""
    monkeypatch.setattr("convert.child.start_python", start_python)
