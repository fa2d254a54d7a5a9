"""Cache of a ladder's measurements: JSON files under a hash of source, examples, versions and recipe."""

import hashlib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from models.common.files import write_atomic

T = TypeVar("T")

_PACKAGES = ("deskside", "llama-cpp-python", "numpy")


def digest(value: Any) -> str:
    """A hash of the value's JSON form, as 64 hex digits."""
    kind = TypeAdapter(type(value))
    return hashlib.sha256(kind.dump_json(value)).hexdigest()


class Cache:
    """Values by name in one folder, all of which depend on `parts`."""

    def __init__(self, folder: Path, parts: Iterable[Any]) -> None:
        self._folder = folder
        self._parts = [*(f"{name} {_version(name)}" for name in _PACKAGES), *map(digest, parts)]

    def value(
        self,
        kind: TypeAdapter[T],
        name: str,
        parts: Iterable[Any],
        make: Callable[[], T],
        keep: Callable[[T], bool] = lambda _: True,
    ) -> T:
        """The value of type `kind` kept under `name` and `parts`; if there is none, make it, and keep it if `keep(it)`.

        A file that cannot be read counts as missing.
        """
        key = digest([*self._parts, name, *map(digest, parts)])
        file = self._folder / f"{key[:32]}.json"
        try:
            return kind.validate_json(file.read_bytes())
        except (OSError, ValidationError):
            made = make()
        if keep(made):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, kind.dump_json(made, indent=2))
        return made


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
