"""Snapshots of computed prefixes that outlive the process: a bounded folder, written by one thread in the background.

    engine's thread ── save, load, index ──▶ DiskStore ── queue ──▶ its thread ──▶ files

No error of the disk reaches the engine: a snapshot that cannot be written is dropped, one that cannot be read is not
there, and the log has one line about it. A snapshot is given only if its file is whole and its tokens, compared
themselves, are the ones asked for.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .folder import IDENTITY_FILE, SUFFIX, bound, kept_files, sweep, write_whole
from .identity import Identity
from .snapshot_file import NO_ADAPTER, BadSnapshot, SnapshotHead, opened, read_head, read_payload, write_snapshot

_log = logging.getLogger("deskside.prefixes")

# Snapshots that wait to be written: so many, and so many bytes in all (one alone may be larger).
MAX_WAITING = 64
MAX_WAITING_BYTES = 128 << 20
# After an error nothing is written for so long.
RETRY_S = 60.0
# Left free on the disk, for other programs.
MARGIN_BYTES = 64 << 20
# A full folder is cut to this share of its bound, so that not every write looks through it.
KEPT_SHARE = 15 / 16


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A snapshot on disk: its key, the adapter's name, its tokens (int32), and the bytes of its payload."""

    key: str
    adapter: str | None
    tokens: np.ndarray
    n_bytes: int


@dataclass(slots=True)
class DiskCounts:
    """Events since the start. `dropped` were not written: queue full, disk full or larger than the bound."""

    written: int = 0
    loaded: int = 0
    missed: int = 0
    dropped: int = 0
    damaged: int = 0
    evicted: int = 0


class DiskStore:
    """The snapshots of one identity under `root`, where all identities together take at most `max_bytes`.

    `adapters` maps the names of loaded LoRA adapters to the SHA-256, in hex, of their files. Every method can be called
    on any thread, and neither they nor the constructor raise an error of the disk.
    """

    def __init__(
        self, root: Path, identity: Identity, max_bytes: int, adapters: Mapping[str, str] | None = None
    ) -> None:
        self._root = root
        self._identity = identity
        self._digest = identity.digest
        self._folder = root / self._digest.hex()[:32]
        self._max_bytes = max_bytes
        self._adapters = {name: bytes.fromhex(sha256) for name, sha256 in (adapters or {}).items()}
        self._lock = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        self._busy = self._closing = self._abandoned = False
        self._known: dict[str, SnapshotHead] = {}
        self._waiting: dict[str, np.ndarray] = {}  # payloads on their way to the disk
        self._gone: dict[str, None] = {}
        self._counts = DiskCounts()
        self._failing: set[str] = set()
        self._retry_at_s = 0.0
        self._spare_bytes = -1
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep(root)
            self._make_room(0)
        except OSError as error:
            self._fail("read or written", error)
        self._thread = threading.Thread(target=self._work, name="prefixes on disk", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> DiskCounts:
        """The events so far."""
        with self._lock:
            return replace(self._counts)

    def index(self) -> list[OnDisk]:
        """The snapshots on disk that the loaded adapters, or none, can use; least recently used first.

        Reads headers and tokens only. Files that are damaged, or of another format, are deleted, with one line in the
        log for all.
        """
        found: list[OnDisk] = []
        n_damaged = 0
        try:
            for file in kept_files(self._folder):
                try:
                    found += self._entries(file.path)
                except FileNotFoundError:
                    continue
                except BadSnapshot:
                    n_damaged += 1
                    file.path.unlink(missing_ok=True)
        except OSError as error:
            self._fail("read", error)
        if n_damaged:
            self._count("damaged", n_damaged)
            _log.warning("%d damaged files of prefixes in %r are ignored and deleted", n_damaged, str(self._folder))
        return found

    def save(self, tokens: np.ndarray, adapter: str | None, payload: np.ndarray) -> str | None:
        """Write a snapshot in the background. Returns its key, good for `load` at once; None if it is dropped.

        `payload` is uint8, of one dimension, and must not change afterwards.
        """
        identifier = NO_ADAPTER if adapter is None else self._adapters.get(adapter)
        if identifier is None:
            return None
        head = SnapshotHead(self._digest, identifier, np.array(tokens, np.int32), payload.nbytes)
        key = head.key
        with self._lock:
            if key in self._waiting:
                return key
            n_bytes = payload.nbytes + sum(other.nbytes for other in self._waiting.values())
            full = len(self._waiting) >= MAX_WAITING or (self._waiting and n_bytes > MAX_WAITING_BYTES)
            if full or self._closing or head.file_bytes > self._max_bytes:
                self._count("dropped")
                return None
            self._known[key] = head
            self._gone.pop(key, None)
            self._waiting[key] = payload
            self._tasks.append(partial(self._write, key, head, payload))
            self._lock.notify_all()
        return key

    def load(self, key: str) -> np.ndarray | None:
        """Read a snapshot's payload now, on the caller's thread; None if it is gone or damaged."""
        with self._lock:
            head, payload = self._known.get(key), self._waiting.get(key)
        if payload is None and head is not None:
            payload = self._read(key, head)
        self._count("missed" if payload is None else "loaded")
        return payload

    def take_gone(self) -> list[str]:
        """The keys of snapshots that went since the last call: evicted, deleted by others, damaged, never written."""
        with self._lock:
            gone, self._gone = list(self._gone), {}
        return gone

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be written. False if that takes longer."""
        with self._lock:
            return self._lock.wait_for(lambda: not (self._tasks or self._busy), timeout_s)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what waits, within `timeout_s`, and drop the rest. Closing twice is harmless."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self.drain(timeout_s):
            self._thread.join(timeout_s)
        else:
            self._abandoned = True  # the thread drops what is left, when the disk lets it

    def _work(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        """Do the next task; its payload is held no longer than that. False once nothing is left after `close`."""
        with self._lock:
            self._busy = False
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._tasks or self._closing)
            if not self._tasks:
                return False
            self._busy = True
            task = self._tasks.popleft()
        try:
            task()
        except Exception:  # noqa: BLE001  (a bug: the thread must live, or the queue stays full)
            _log.exception("the store of prefixes on disk broke")
        return True

    def _write(self, key: str, head: SnapshotHead, payload: np.ndarray) -> None:
        written = False
        try:
            if not self._abandoned and time.monotonic() >= self._retry_at_s:
                self._put(self._path(key), head, payload)
                written = True
                self._failing.discard("written")
        except (OSError, MemoryError) as error:
            self._retry_at_s = time.monotonic() + RETRY_S
            self._fail("written", error)
        finally:
            with self._lock:
                del self._waiting[key]
                self._count("written" if written else "dropped")
                if not written:
                    self._forget([key])

    def _put(self, path: Path, head: SnapshotHead, payload: np.ndarray) -> None:
        """Write a snapshot, unless it is there: then this is a use of it."""
        with suppress(FileNotFoundError, BadSnapshot), opened(path) as file:
            if read_head(file).same(head):
                _touch(file)
                return
        self._make_room(head.file_bytes)
        if shutil.disk_usage(self._root).free < head.file_bytes + MARGIN_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with suppress(FileNotFoundError):  # another server may remove the folder while it is empty
            self._write_file(path, head, payload)
            return
        self._write_file(path, head, payload)

    def _write_file(self, path: Path, head: SnapshotHead, payload: np.ndarray) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.stat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"{str(self._folder)!r} belongs to another user")
        if not (self._folder / IDENTITY_FILE).exists():
            write_whole(self._folder / IDENTITY_FILE, lambda file: file.write(self._identity.to_json()))
        write_whole(path, partial(_write_used, head, payload))

    def _read(self, key: str, head: SnapshotHead) -> np.ndarray | None:
        path = self._path(key)
        try:
            with opened(path) as file:
                found = read_head(file)
                if not found.same(head):
                    raise BadSnapshot("it holds other tokens")
                payload = read_payload(file, found)
                _touch(file)
                return payload
        except (FileNotFoundError, NotADirectoryError):
            pass  # another server deleted it, or a person
        except BadSnapshot as error:
            _log.warning("the prefix in %r is ignored and deleted: %s", str(path), error)
            self._count("damaged")
            with suppress(OSError):
                path.unlink()
        except (OSError, MemoryError) as error:
            self._fail("read", error)
            return None
        self._forget([key])
        return None

    def _entries(self, path: Path) -> list[OnDisk]:
        """The snapshot in a file, once for each name of its adapter. Raises BadSnapshot, OSError."""
        with opened(path) as file:
            head = read_head(file)
        if head.identity != self._digest or head.key + SUFFIX != path.name:
            raise BadSnapshot("it is filed in the wrong place")
        names = [name for name, sha256 in self._adapters.items() if sha256 == head.adapter]
        with self._lock:
            self._known[head.key] = head
        every = [None] if head.adapter == NO_ADAPTER else names
        return [OnDisk(head.key, name, head.tokens, head.n_bytes) for name in every]

    def _make_room(self, n_bytes: int) -> None:
        """Evict so that `n_bytes` more are within the bound, and forget what others deleted.

        Half of the room that a look through the folder finds is used before the next: other servers write too.
        """
        if n_bytes <= self._spare_bytes:
            self._spare_bytes -= n_bytes
            return
        most = self._max_bytes - n_bytes
        left, evicted = bound(self._root, most, min(most, int(self._max_bytes * KEPT_SHARE)))
        self._spare_bytes = (most - sum(file.n_bytes for file in left)) // 2
        names = {file.path.name for file in left if file.path.parent == self._folder}
        with self._lock:
            self._count("evicted", len(evicted))
            self._forget([key for key in self._known if key + SUFFIX not in names and key not in self._waiting])

    def _forget(self, keys: list[str]) -> None:
        with self._lock:
            self._gone.update((key, None) for key in keys if self._known.pop(key, None) is not None)

    def _path(self, key: str) -> Path:
        return self._folder / (key + SUFFIX)

    def _count(self, what: str, by: int = 1) -> None:
        with self._lock:
            setattr(self._counts, what, getattr(self._counts, what) + by)

    def _fail(self, what: str, error: Exception) -> None:
        """Log the first of a row of failures."""
        if what not in self._failing:
            self._failing.add(what)
            reason = getattr(error, "strerror", None) or repr(error)
            _log.warning("prefixes cannot be %s in %r: %s; the server goes on without", what, str(self._root), reason)


def _write_used(head: SnapshotHead, payload: np.ndarray, file: BinaryIO) -> None:
    write_snapshot(file, head, payload)
    file.flush()
    _touch(file)


def _touch(file: BinaryIO) -> None:
    """Note a use of the snapshot, by a finer clock than the file system's own."""
    now_ns = time.time_ns()
    with suppress(OSError):
        os.utime(file.fileno(), ns=(now_ns, now_ns))
