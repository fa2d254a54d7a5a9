"""The real KV cache, edited as planned, and the bytes of snapshots: in memory, and on disk if a folder is given.

    Save      cells ─► bytes in memory ─► a file, written in the background
    Restore   bytes in memory, or else a file ─► cells

The catalogue (`Snapshots`) decides which snapshots are kept, and knows those on disk from the start. Bytes that turn
out to be gone or damaged are an edit that fails: the sequence's tokens are computed.
"""

from collections.abc import Sequence

import numpy as np

from runtime.errors import EngineError
from runtime.llama.interface import LlamaLike
from runtime.prefixes.disk import DiskStore

from .prefix_cache import Copy, Edit, Restore, Save
from .snapshots import Snapshots

# By sequence id: the snapshot, and the other sequence, that cells which are not whole came from.
Lost = dict[int, tuple[int | None, int | None]]


class KvCache:
    """Carries out edits on a model's KV cache. Without `snapshots` no edit saves or restores."""

    def __init__(self, llama: LlamaLike, snapshots: Snapshots | None, disk: DiskStore | None = None) -> None:
        """Read the tokens of the snapshots on `disk`; their bytes are read when they are restored."""
        self._llama = llama
        self._snapshots = snapshots
        self._disk = disk
        self._saved: dict[int, np.ndarray] = {}
        self._files: dict[int, str] = {}  # the disk's name for each snapshot there
        self.n_restored = 0
        if snapshots is not None and disk is not None:
            for found in disk.index():
                key = snapshots.add(found.tokens, found.adapter)
                if key is not None:
                    self._file(snapshots, key, found.key)
            self._forget(snapshots, set())

    @property
    def on_disk(self) -> bool:
        """True if snapshots are written to disk as well."""
        return self._disk is not None

    @property
    def counts(self) -> dict[str, int]:
        """Events on disk so far, by the names of `EngineStats`."""
        if self._disk is None:
            return {}
        counts = self._disk.counts
        return {
            "disk_prefixes_written_total": counts.written,
            "disk_prefixes_loaded_total": counts.loaded,
            "disk_prefixes_dropped_total": counts.dropped,
            "disk_prefixes_damaged_total": counts.damaged,
        }

    def apply(self, edits: Sequence[Edit]) -> Lost:
        """Carry out the edits, in order. Returns the sequences that are not whole after them."""
        lost: Lost = {}
        wanted = {edit.snapshot for edit in edits if isinstance(edit, Restore)}
        for edit in edits:
            if isinstance(edit, Save):
                self._save(edit, wanted)
            elif isinstance(edit, Restore):
                if not self._restore(edit, wanted):
                    lost[edit.seq_id] = (edit.snapshot, None)
            elif isinstance(edit, Copy):
                if edit.source not in lost:
                    self._llama.copy_prefix(edit.source, edit.target, edit.length)
                if edit.source in lost or not self._llama.is_whole(edit.target, edit.length):
                    lost[edit.target] = (None, edit.source)
            else:
                self._llama.remove(edit.seq_id, edit.start)
                lost.pop(edit.seq_id, None)
                if edit.start and not self._llama.is_whole(edit.seq_id, edit.start):
                    lost[edit.seq_id] = (None, None)
        if self._snapshots is not None:
            self._forget(self._snapshots, wanted)
        return lost

    def clear(self) -> None:
        """Empty the cache and give its memory back; snapshots stay."""
        self._llama.clear()

    def close(self) -> None:
        """Write what waits for the disk."""
        if self._disk is not None:
            self._disk.close()

    def check(self) -> None:
        """Raise AssertionError unless catalogue and bytes agree."""
        if self._snapshots is not None:
            self._snapshots.check()
            n_bytes = sum(data.nbytes for data in self._saved.values())
            assert n_bytes == self._snapshots.n_bytes, "the catalogue counts other bytes than there are"
            assert all(key in self._snapshots for key in self._files), "a file belongs to no snapshot"

    def _save(self, save: Save, wanted: set[int]) -> None:
        """Take a snapshot, if it still counts or is to be restored at once."""
        assert self._snapshots is not None
        if save.snapshot not in self._snapshots and save.snapshot not in wanted:
            return
        try:
            if not self._llama.is_whole(save.seq_id, save.length):
                raise EngineError("cells that left the window are gone")
            data = self._llama.save(save.seq_id)
        except (EngineError, MemoryError):
            self._snapshots.drop(save.snapshot)
            return
        if self._disk is not None and save.snapshot in self._snapshots:
            name = self._disk.save(*self._snapshots.content(save.snapshot), data)
            if name is not None:
                self._file(self._snapshots, save.snapshot, name)
        self._keep(self._snapshots, save.snapshot, data, wanted)

    def _restore(self, edit: Restore, wanted: set[int]) -> bool:
        data = self._saved.get(edit.snapshot)
        if data is None and self._disk is not None and self._snapshots is not None and edit.snapshot in self._files:
            data = self._disk.load(self._files[edit.snapshot])
            if data is not None:
                self._keep(self._snapshots, edit.snapshot, data, wanted)
        if data is None or not self._llama.restore(edit.seq_id, data, edit.length):
            return False
        self.n_restored += 1
        return True

    def _keep(self, snapshots: Snapshots, key: int, data: np.ndarray, wanted: set[int]) -> None:
        """Keep the bytes of a snapshot in memory, within the bound, and those in use beyond it for now."""
        self._saved[key] = data
        snapshots.note_size(key, data.nbytes)
        for taken in snapshots.bound():
            if taken not in wanted:
                self._saved.pop(taken, None)

    def _file(self, snapshots: Snapshots, key: int, name: str) -> None:
        self._files[key] = name
        snapshots.note_disk(key, on_disk=True)

    def _forget(self, snapshots: Snapshots, used: set[int]) -> None:
        """Forget the files that are gone, and the bytes of snapshots that take no memory any more."""
        gone = set() if self._disk is None else set(self._disk.take_gone())
        for key in [key for key, name in self._files.items() if name in gone]:
            del self._files[key]
            snapshots.note_disk(key, on_disk=False)
        for key in snapshots.take_dropped():
            self._saved.pop(key, None)
            self._files.pop(key, None)
        for key in used:
            if not snapshots.in_memory(key):
                self._saved.pop(key, None)
