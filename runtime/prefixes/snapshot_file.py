"""The file of one snapshot: header, token ids, the bytes that a model computed for them, and checksums.

    magic, version, identity, adapter, tokens, bytes   96 bytes, little-endian
    token ids                                          int32 each
    checksum of everything before                      16 bytes: a list of files reads no payload
    payload                                            as the engine saved it
    checksum of header, token ids and payload          16 bytes

The checksums are XXH3-128: 14 GB/s on a laptop's core where BLAKE2 has 0.4, so that neither writing nor reading takes
time from a model. They find damage; the files belong to the user who runs the server, and nothing else is trusted.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from models.common.machine import own_pages

VERSION = 1
NO_ADAPTER = bytes(32)
_MAGIC = b"DskPrefx"
_FIXED = struct.Struct("<8sQ32s32sQQ")
_SUM_BYTES = 16
_TOKEN = np.dtype("<i4")


class BadSnapshot(Exception):
    """The file is no whole snapshot of this format and user."""


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotHead:
    """The identity of what computed the snapshot, its adapter's SHA-256, its tokens, and the bytes of its payload."""

    identity: bytes
    adapter: bytes
    tokens: np.ndarray
    n_bytes: int

    @property
    def key(self) -> str:
        """The name of the snapshot: a hash of all that its payload depends on."""
        return hashlib.sha256(self.identity + self.adapter + self._token_bytes).hexdigest()[:40]

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        return _file_bytes(len(self.tokens), self.n_bytes)

    def same(self, other: "SnapshotHead") -> bool:
        """True if the other is of the same tokens, computed by the same, under the same adapter."""
        mine, others = (self.identity, self.adapter), (other.identity, other.adapter)
        return mine == others and np.array_equal(self.tokens, other.tokens)

    def pack(self) -> bytes:
        """Header and token ids."""
        fixed = _FIXED.pack(_MAGIC, VERSION, self.identity, self.adapter, len(self.tokens), self.n_bytes)
        return fixed + self._token_bytes

    @property
    def _token_bytes(self) -> bytes:
        return self.tokens.astype(_TOKEN, copy=False).tobytes()


def write_snapshot(file: BinaryIO, head: SnapshotHead, payload: np.ndarray) -> None:
    """Write the whole file. `payload` is uint8 of shape (head.n_bytes,)."""
    begin = head.pack()
    checksum = xxhash.xxh3_128(begin)
    file.write(begin + checksum.digest())
    checksum.update(payload.data)
    file.write(payload.data)
    file.write(checksum.digest())


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a snapshot's file. Raises BadSnapshot if it is another user's, OSError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_uid != os.geteuid():
            raise BadSnapshot("it belongs to another user")
        yield file


def read_head(file: BinaryIO) -> SnapshotHead:
    """Read and check the file's header and token ids. Raises BadSnapshot, OSError."""
    fixed = _exactly(file, _FIXED.size)
    magic, version, identity, adapter, n_tokens, n_bytes = _FIXED.unpack(fixed.tobytes())
    if magic != _MAGIC:
        raise BadSnapshot("it does not begin like a snapshot")
    if version != VERSION:
        raise BadSnapshot(f"it has format {version}, not {VERSION}")
    found, expected = os.fstat(file.fileno()).st_size, _file_bytes(n_tokens, n_bytes)
    if found != expected:
        raise BadSnapshot(f"it has {found} bytes, not {expected}")
    tokens = _exactly(file, n_tokens * _TOKEN.itemsize)
    checksum = xxhash.xxh3_128(fixed.data)
    checksum.update(tokens.data)
    if _exactly(file, _SUM_BYTES).tobytes() != checksum.digest():
        raise BadSnapshot("its header or tokens do not agree with their checksum")
    return SnapshotHead(identity, adapter, tokens.view(_TOKEN).astype(np.int32, copy=False), n_bytes)


def read_payload(file: BinaryIO, head: SnapshotHead) -> np.ndarray:
    """Read and check the payload after `head`, as uint8. Raises BadSnapshot, OSError, MemoryError.

    The bytes are in memory before they are checked: a file that changes later changes nothing.
    """
    payload = _exactly(file, head.n_bytes)
    checksum = xxhash.xxh3_128(head.pack())
    checksum.update(payload.data)
    if _exactly(file, _SUM_BYTES).tobytes() != checksum.digest():
        raise BadSnapshot("its content does not agree with its checksum")
    return payload


def _file_bytes(n_tokens: int, n_bytes: int) -> int:
    return _FIXED.size + n_tokens * _TOKEN.itemsize + n_bytes + 2 * _SUM_BYTES


def _exactly(file: BinaryIO, n_bytes: int) -> np.ndarray:
    data = own_pages(n_bytes)
    done = 0
    while done < n_bytes:
        count = file.readinto(data[done:].data)  # type: ignore[attr-defined]
        if not count:
            raise BadSnapshot(f"it ends after {done} of {n_bytes} bytes")
        done += count
    return data
