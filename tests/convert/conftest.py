"""How conversion's child processes are started: forked with everything imported, unless a test is about the start."""

import sys
from collections.abc import Iterator

import pytest

from convert.child import start_python
from tests.support.convert.forked import Forked


@pytest.fixture(scope="module", autouse=True)
def forked_children() -> Iterator[None]:
    """Children begin their work at once. Not on macOS, where a process that has loaded Metal must not be forked."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setattr("convert.child.start_python", Forked)
        yield


@pytest.fixture
def fresh_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children are new interpreters, as users have them."""
    monkeypatch.setattr("convert.child.start_python", start_python)
