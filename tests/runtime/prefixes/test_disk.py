"""Snapshots on disk: what was saved comes back after a restart, or nothing does, and no error of the disk leaves."""

import errno
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.prefixes import disk as module
from runtime.prefixes import snapshot_file
from runtime.prefixes.disk import DiskStore
from runtime.prefixes.folder import KeptFile, bound, write_whole
from tests.support.runtime.prefixes import IDENTITY, files, keep, payload, store, tokens


@contextmanager
def stalled(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A disk that writes nothing until the block ends, or the function is called."""
    begun, go = threading.Event(), threading.Event()
    put = disk._put

    def wait(*args: Any) -> None:
        begun.set()
        assert go.wait(60)
        put(*args)

    monkeypatch.setattr(disk, "_put", wait)
    disk.save(tokens(99), None, payload(tokens(99)))
    assert begun.wait(60)
    yield go.set
    go.set()
    assert disk.drain(60)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_snapshots_outlive_the_store(tmp_path: Path) -> None:
    before = store(tmp_path)
    saved = {
        before.save(tokens(name), adapter, payload(tokens(name))): (adapter, name)
        for name, adapter in enumerate([None, "mail", None, "tickets"])
    }
    before.close()
    after = store(tmp_path)
    found = {entry.key: entry for entry in after.index()}
    assert found.keys() == saved.keys()
    for key, (adapter, name) in saved.items():
        entry = found[str(key)]
        assert (entry.adapter, entry.n_bytes) == (adapter, 2000)
        assert np.array_equal(entry.tokens, tokens(name))
        loaded = after.load(entry.key)
        assert loaded is not None
        assert np.array_equal(loaded, payload(tokens(name)))
    assert (before.counts.written, after.counts.loaded, after.counts.missed) == (4, 4, 0)
    after.close()


def test_files_are_readable_by_this_user_only(tmp_path: Path) -> None:
    disk = store(tmp_path / "prefixes")
    keep(disk, 1)
    disk.close()
    folders = [path for path in (tmp_path / "prefixes").rglob("*") if path.is_dir()]
    made = [path for path in (tmp_path / "prefixes").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "prefixes", *folders)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
    assert len(made) == 2


def test_another_identity_or_adapter_finds_nothing(tmp_path: Path) -> None:
    disk = store(tmp_path)
    disk.save(tokens(1), "mail", payload(tokens(1)))
    disk.close()
    for field in ("sha256", "library", "computing"):
        assert store(tmp_path, identity=replace(IDENTITY, **{field: "0" * 64})).index() == []
    assert DiskStore(tmp_path, IDENTITY, 1 << 20, {"mail": "03" * 32}).index() == []
    [entry] = DiskStore(tmp_path, IDENTITY, 1 << 20, {"post": "01" * 32}).index()
    assert entry.adapter == "post"


def test_a_snapshot_under_an_unknown_adapter_is_not_kept(tmp_path: Path) -> None:
    disk = store(tmp_path)
    assert disk.save(tokens(1), "unknown", payload(tokens(1))) is None
    disk.close()
    assert files(tmp_path) == []


def test_a_snapshot_can_be_loaded_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = store(tmp_path)
    with stalled(disk, monkeypatch):
        key = disk.save(tokens(1), None, payload(tokens(1)))
        assert key is not None
        loaded = disk.load(key)
        assert loaded is not None
        assert np.array_equal(loaded, payload(tokens(1)))
        assert disk.save(tokens(1), None, payload(tokens(1))) == key
    assert disk.counts.written == 2
    disk.close()


def test_a_full_queue_drops_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    disk = store(tmp_path)
    with stalled(disk, monkeypatch):
        keys = [disk.save(tokens(name), None, payload(tokens(name))) for name in range(5)]
        assert [key is None for key in keys] == [False, False, True, True, True]
    assert (disk.counts.written, disk.counts.dropped) == (3, 3)
    disk.close()


def test_the_queue_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One snapshot alone may be larger."""
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 5000)
    disk = store(tmp_path)
    with stalled(disk, monkeypatch):
        sizes = [2000, 4000, 1000, 1]
        keys = [disk.save(tokens(name), None, payload(tokens(name), size)) for name, size in enumerate(sizes)]
        assert [key is None for key in keys] == [False, True, False, True]
    assert disk.save(tokens(9), None, payload(tokens(9), 9000)) is not None
    disk.close()
    assert len(files(tmp_path)) == 4


def test_close_drops_what_the_disk_does_not_take_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = store(tmp_path)
    [kept] = keep(disk, 1)
    with stalled(disk, monkeypatch):
        key = disk.save(tokens(2), None, payload(tokens(2)))
        disk.close(timeout_s=0)
        assert disk.save(tokens(3), None, payload(tokens(3))) is None
    assert disk.load(kept) is not None
    assert key in disk.take_gone()
    disk.close()
    assert (disk.counts.written, disk.counts.dropped) == (2, 2)


@pytest.mark.parametrize("place", ["header", "tokens", "payload", "checksum", "end"])
def test_a_damaged_file_is_ignored_with_one_line_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    disk = store(tmp_path)
    [key] = keep(disk, 1)
    [path] = files(tmp_path)
    content = bytearray(path.read_bytes())
    at = {"header": 40, "tokens": 120, "payload": 800, "checksum": len(content) - 1, "end": 0}[place]
    content[at] ^= 1
    path.write_bytes(content[:-1] if place == "end" else content)
    assert disk.load(key) is None
    assert disk.load(key) is None
    assert len(warnings(caplog)) == 1
    assert "is ignored and deleted" in warnings(caplog)[0]
    assert files(tmp_path) == []
    assert disk.take_gone() == [key]
    assert disk.take_gone() == []
    assert (disk.counts.damaged, disk.counts.missed) == (1, 2)
    keep(disk, 1)
    assert disk.load(key) is not None
    disk.close()


def test_the_index_skips_damaged_and_foreign_files_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = store(tmp_path)
    keys = keep(disk, 1, 2, 3, 4)
    monkeypatch.setattr(snapshot_file, "VERSION", 2)
    keep(disk, 5)
    monkeypatch.undo()
    disk.close()
    folder = files(tmp_path)[0].parent
    paths = [folder / f"{key}.prefix" for key in keys]
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    paths[1].write_bytes(b"GGUF" * 100)
    shutil.copy(paths[2], folder / ("0" * 40 + ".prefix"))
    (folder / "notes.prefix").write_text("mine")
    disk = store(tmp_path)
    assert sorted(entry.key for entry in disk.index()) == sorted(keys[2:])
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("4 damaged files of prefixes")
    assert (folder / "notes.prefix").exists()
    assert len(disk.index()) == 2
    assert len(warnings(caplog)) == 1
    disk.close()


def test_other_tokens_under_the_same_name_are_never_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the hash of two prompts were the same."""
    monkeypatch.setattr(snapshot_file.SnapshotHead, "key", "0" * 40)
    before, after = store(tmp_path), store(tmp_path)
    [key] = keep(before, 1)
    keep(after, 2)
    assert before.load(key) is None
    before.close()
    after.close()


def test_a_file_deleted_by_another_server_is_a_miss_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = store(tmp_path)
    one, two = keep(disk, 1, 2)
    files(tmp_path)[0].unlink()
    assert sorted([disk.load(one) is None, disk.load(two) is None]) == [False, True]
    assert len(disk.take_gone()) == 1
    assert warnings(caplog) == []
    disk.close()


def test_a_cleared_folder_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = store(tmp_path)
    keep(disk, 1)
    shutil.rmtree(files(tmp_path)[0].parent)
    keep(disk, 2)
    assert len(files(tmp_path)) == 1
    assert warnings(caplog) == []
    disk.close()


def test_a_folder_removed_by_another_server_while_it_is_empty_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = store(tmp_path)
    seen = list[str]()

    def removed(path: Path, write: Callable[[Any], object]) -> None:
        seen.append(path.suffix)
        if seen == [".json", ".prefix"]:
            shutil.rmtree(path.parent)
        write_whole(path, write)

    monkeypatch.setattr(module, "write_whole", removed)
    keep(disk, 1)
    assert seen == [".json", ".prefix"] * 2
    assert (len(files(tmp_path)), warnings(caplog)) == (1, [])
    disk.close()


def test_a_bug_does_not_end_the_thread(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_put", None)
        keep(disk, 1)
    assert warnings(caplog) == ["the store of prefixes on disk broke"]
    keep(disk, 2)
    assert (disk.counts.written, disk.counts.dropped) == (1, 1)
    disk.close()


def test_the_least_recently_used_goes_and_is_told(tmp_path: Path) -> None:
    disk = store(tmp_path, max_bytes=3 * 2328)
    keys = keep(disk, 1, 2, 3)
    assert files(tmp_path)[0].stat().st_size == 2328
    assert disk.load(keys[0]) is not None
    keep(disk, 4)
    assert disk.take_gone() == [keys[1]]
    keep(disk, 3)  # on disk already: a use
    keep(disk, 5)
    assert disk.take_gone() == [keys[0]]
    assert (disk.counts.evicted, len(files(tmp_path))) == (2, 3)
    disk.close()


def test_a_snapshot_larger_than_the_bound_is_dropped(tmp_path: Path) -> None:
    disk = store(tmp_path, max_bytes=2327)
    assert disk.save(tokens(1), None, payload(tokens(1))) is None
    disk.close()
    assert disk.counts.dropped == 1


def test_a_smaller_bound_holds_from_the_start(tmp_path: Path) -> None:
    disk = store(tmp_path)
    keys = keep(disk, 1, 2, 3)
    disk.close()
    disk = store(tmp_path, max_bytes=5 * 2328 // 2)
    assert [entry.key for entry in disk.index()] == keys[1:]
    disk.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from(["save", "load", "restart", "vanish"]), st.integers(0, 5)), max_size=25)
)
def test_it_keeps_what_a_list_by_last_use_keeps(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int]]
) -> None:
    """Random operations beside a naive model: at most three snapshots, of 2328 bytes each."""
    root = tmp_path_factory.mktemp("prefixes")
    now = iter(range(1, 1 << 30))
    monkeypatch.setattr(time, "time_ns", lambda: next(now) * 10**9)
    disk, held, keys = store(root, 3 * 2328 + 5), list[int](), dict[int, str]()
    for what, name in steps:
        if what == "save":
            [keys[name]] = keep(disk, name)
            held = [*(other for other in held if other != name), name][-3:]
        elif what == "load" and name in keys:
            loaded = disk.load(keys[name])
            assert (loaded is not None) == (name in held)
            if loaded is not None:
                assert np.array_equal(loaded, payload(tokens(name)))
                held = [*(other for other in held if other != name), name]
        elif what == "restart":
            disk.close()
            disk = store(root, 3 * 2328 + 5)
            assert [entry.key for entry in disk.index()] == [keys[other] for other in held]
        elif what == "vanish" and name in held:
            next(root.glob(f"*/{keys[name]}.prefix")).unlink()
            held.remove(name)
        assert {path.stem for path in files(root)} == {keys[other] for other in held}
        assert disk._known.keys() >= {keys[other] for other in held}
    disk.close()


def test_a_folder_with_room_is_not_looked_through_at_each_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []

    def noted(root: Path, *bytes_: int) -> tuple[list[KeptFile], list[KeptFile]]:
        looks.append(root)
        return bound(root, *bytes_)

    monkeypatch.setattr(module, "bound", noted)
    disk = store(tmp_path, max_bytes=100 * 2328)
    keep(disk, *range(130))
    assert len(looks) < 25
    assert 90 <= len(files(tmp_path)) <= 100
    assert len(disk.take_gone()) == 130 - len(files(tmp_path))
    disk.close()


def test_many_prompts_leave_no_trace_in_memory(tmp_path: Path) -> None:
    disk = store(tmp_path, max_bytes=3 * 2328)
    keep(disk, *range(30))
    assert len(disk._known) <= 4
    assert disk._waiting == {}
    assert len(disk.take_gone()) == 27
    disk.close()


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("seam", ["write_whole", "write_snapshot"])
def test_a_full_disk_is_one_line_and_is_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    disk = store(tmp_path)
    [kept] = keep(disk, 1)

    def refuse(*_: Any) -> None:
        raise full()

    with monkeypatch.context() as patch:
        patch.setattr(module, seam, refuse)
        keys = keep(disk, 2, 3, 4)
    assert warnings(caplog) == [
        f"prefixes cannot be written in {str(tmp_path)!r}: No space left on device; the server goes on without"
    ]
    assert (disk.counts.written, disk.counts.dropped) == (1, 3)
    assert disk.take_gone() == keys
    assert disk.load(kept) is not None
    keep(disk, 5)
    assert len(files(tmp_path)) == 1, "nothing is written for a while"
    disk._retry_at_s = 0
    keep(disk, 6)
    assert len(files(tmp_path)) == 2
    assert len(warnings(caplog)) == 1
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    disk.close()


def test_some_of_the_disk_is_left_to_other_programs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MARGIN_BYTES", 1 << 62)
    disk = store(tmp_path)
    keep(disk, 1)
    assert files(tmp_path) == []
    assert "No space left" in warnings(caplog)[0]
    disk.close()


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_a_folder_removed_at_run_time_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, instead: str
) -> None:
    disk = store(tmp_path / "prefixes")
    [key] = keep(disk, 1)
    shutil.rmtree(tmp_path / "prefixes")
    if instead == "a file":
        (tmp_path / "prefixes").write_text("")
    assert disk.load(key) is None
    keep(disk, 2, 3)
    assert disk.index() == []
    assert len([line for line in warnings(caplog) if "written" in line]) == 1
    assert len(warnings(caplog)) == (1 if instead == "nothing" else 2)
    disk.close()


def test_a_folder_that_is_lost_before_the_start_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "prefixes").write_text("")
    disk = store(tmp_path / "prefixes")
    assert len(warnings(caplog)) == 1
    disk.close()


def test_a_file_that_cannot_be_read_is_one_line_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = store(tmp_path)
    one, two = keep(disk, 1, 2)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(module, "opened", refuse)
        assert [disk.load(one), disk.load(two)] == [None, None]
    assert warnings(caplog) == [
        f"prefixes cannot be read in {str(tmp_path)!r}: Permission denied; the server goes on without"
    ]
    assert disk.load(one) is not None
    disk.close()


def test_no_memory_for_a_payload_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = store(tmp_path)
    [key] = keep(disk, 1)

    def refuse(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "read_payload", refuse)
    assert disk.load(key) is None
    disk.close()


def test_a_folder_made_by_another_user_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = store(tmp_path)
    uid = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    keep(disk, 1)
    assert files(tmp_path) == []
    assert "belongs to another user" in warnings(caplog)[0]
    disk.close()


def test_what_a_dead_process_left_unfinished_is_removed_at_the_start(tmp_path: Path) -> None:
    disk = store(tmp_path)
    keep(disk, 1)
    disk.close()
    left = files(tmp_path)[0].parent / ".0123.part"
    left.write_bytes(b"half")
    store(tmp_path).close()
    assert not left.exists()
    assert len(files(tmp_path)) == 1
