"""The install size of a program: run by the Python of its own environment.

    python needs.py DISTRIBUTION ... < names of modules, one a line

prints {"installed": bytes of these distributions and all that they require, "loaded": bytes of those that provide the
modules}. Compiled files (.pyc) are not counted: pip does not always write them.
"""

import json
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Name -> distribution: the roots and everything installed that they require, extras left out."""
    todo, found = list(roots), dict[str, metadata.Distribution]()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system, or another Python
        requirements = [Requirement(text) for text in found[name].requires or ()]
        todo += [wanted.name for wanted in requirements if not wanted.marker or wanted.marker.evaluate({"extra": ""})]
    return {str(name): distribution for name, distribution in found.items()}


def providers(modules: Iterable[str]) -> dict[str, metadata.Distribution]:
    """Name -> distribution of those that provide the modules; the standard library's belong to none."""
    packages = metadata.packages_distributions()
    names = {name for module in modules for name in packages.get(module.partition(".")[0], ())}
    return {str(canonicalize_name(name)): metadata.distribution(name) for name in names}


def n_bytes(distributions: dict[str, metadata.Distribution]) -> int:
    """The size of their files."""
    paths = (Path(str(one.locate_file(file))) for one in distributions.values() for file in one.files or ())
    return sum(path.stat().st_size for path in paths if path.suffix != ".pyc" and path.is_file())


if __name__ == "__main__":
    sizes = {"installed": n_bytes(required(sys.argv[1:])), "loaded": n_bytes(providers(sys.stdin.read().split()))}
    json.dump(sizes, sys.stdout)
