"""Snapshots to keep on disk: a payload follows from its tokens, so that a wrong one is seen."""

from pathlib import Path

import numpy as np

from runtime.prefixes.disk import DiskStore
from runtime.prefixes.identity import Identity

IDENTITY = Identity("toy", "ab" * 32, "llama-cpp-python 0.3", "f16, 4 threads")
ADAPTERS = {"mail": "01" * 32, "tickets": "02" * 32}


def tokens(name: int, n_tokens: int = 50) -> np.ndarray:
    """The tokens of a prompt."""
    return (np.arange(n_tokens, dtype=np.int32) * 7 + name * 1000).astype(np.int32)


def payload(of: np.ndarray, n_bytes: int = 2000) -> np.ndarray:
    """The bytes that a model would have computed for the tokens."""
    return np.random.default_rng(of).integers(0, 256, n_bytes, np.uint8)


def store(root: Path, max_bytes: int = 1 << 20, identity: Identity = IDENTITY) -> DiskStore:
    """A store with two adapters."""
    return DiskStore(root, identity, max_bytes, ADAPTERS)


def keep(disk: DiskStore, *names: int) -> list[str]:
    """Save a snapshot for each of the names, and wait until they are written."""
    keys = []
    for name in names:
        key = disk.save(tokens(name), None, payload(tokens(name)))
        assert key is not None
        assert disk.drain(60)
        keys.append(key)
    return keys


def files(root: Path) -> list[Path]:
    """All snapshots under the folder."""
    return sorted(root.glob("*/*.prefix"))
