"""The folder of snapshots: bounded by last use, cleared of its own files only, refused where it cannot be written."""

import errno
import fcntl
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import LoadFailed
from runtime.prefixes.folder import bound, clear, kept_files, prepare, shelves, sweep, write_whole
from tests.support.runtime.prefixes import IDENTITY, files, keep, store


def filled(root: Path, *names: int, model: str = "toy") -> list[Path]:
    """The files of snapshots made in this order, oldest first, used a second apart."""
    disk = store(root, identity=replace(IDENTITY, model=model, computing=model))
    keep(disk, *names)
    disk.close()
    [folder] = [path.parent for path in root.glob("*/identity.json") if f'"{model}"' in path.read_text()]
    made = [file.path for file in kept_files(folder)]
    for second, path in enumerate(made):
        os.utime(path, (second, second))
    return made


def test_prepare_makes_a_folder_for_this_user(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "folder"
    prepare(root)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert list(root.iterdir()) == []


def test_prepare_leaves_the_rights_of_a_folder_that_is_there(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    prepare(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_prepare_names_the_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadFailed, match=r"prefixes cannot be kept in '.*/file/x': .*--prefix-disk"):
        prepare(tmp_path / "file" / "x")


def test_prepare_tries_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(LoadFailed, match="Permission denied"):
        prepare(tmp_path)


def test_the_least_recently_used_goes_first_of_all_identities(tmp_path: Path) -> None:
    one, two = filled(tmp_path, 1, 2, 3, model="one"), filled(tmp_path, 1, 2, model="two")
    by_use = [one[1], two[0], one[2], two[1], one[0]]
    for second, path in enumerate(by_use):
        os.utime(path, (second, second))
    size = one[0].stat().st_size
    left, gone = bound(tmp_path, 4 * size, 3 * size + 1)
    assert [file.path for file in gone] == by_use[:2]
    assert [file.path for file in left] == by_use[2:]
    assert files(tmp_path) == sorted(by_use[2:])
    assert bound(tmp_path, 3 * size, size) == (left, [])


def test_a_folder_without_snapshots_goes_with_the_last(tmp_path: Path) -> None:
    [path] = filled(tmp_path, 1)
    bound(tmp_path, 0, 0)
    assert not path.parent.exists()


def test_a_file_that_vanishes_meanwhile_is_counted_as_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(tmp_path, 1, 2)
    size, unlink = made[0].stat().st_size, Path.unlink

    def twice(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=True)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", twice)
    assert [file.path for file in bound(tmp_path, size, size)[1]] == made[:1]


def test_only_what_no_process_writes_is_swept(tmp_path: Path) -> None:
    [path] = filled(tmp_path, 1)
    dead, alive = path.parent / ".dead.part", path.parent / ".alive.part"
    dead.write_bytes(b"half")
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert sweep(tmp_path) == 1
        assert (dead.exists(), alive.exists(), path.exists()) == (False, True, True)
    assert sweep(tmp_path) == 1
    assert not alive.exists()


def test_a_file_swept_before_its_lock_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, lock = [], fcntl.flock

    def late(file: Any, how: int) -> None:
        made.append(next(tmp_path.glob(".*.part")))
        if len(made) == 1:
            made[0].unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_whole(tmp_path / "x", lambda file: file.write(b"content"))
    assert len(made) == 2
    assert (tmp_path / "x").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_shelves_sum_up_each_identity(tmp_path: Path) -> None:
    one, two = filled(tmp_path, 1, 2, 3, model="one"), filled(tmp_path, 1, model="two")
    one[1].write_bytes(b"damaged")
    os.utime(one[1], (1, 1))
    (two[0].parent / "identity.json").unlink()
    os.utime(two[0], (100, 100))
    lost, known = shelves(tmp_path)
    assert (lost.identity, lost.n_files, lost.n_tokens, lost.used_ns) == (None, 1, 50, 100 * 10**9)
    assert known.identity == replace(IDENTITY, model="one", computing="one")
    assert (known.n_files, known.n_damaged, known.n_tokens) == (3, 1, 100)
    assert known.n_bytes == 7 + 2 * one[0].stat().st_size


def test_clear_deletes_snapshots_and_nothing_else(tmp_path: Path) -> None:
    [one], two = filled(tmp_path, 1, model="one"), filled(tmp_path, 1, 2, model="two")
    n_bytes = sum(path.stat().st_size for path in (one, *two))
    (one.parent / "notes.txt").write_text("mine")
    (tmp_path / "photo.prefix").write_text("mine")
    (tmp_path / "0123").mkdir()
    cleared = clear(tmp_path)
    assert (cleared.n_files, cleared.n_bytes, cleared.failures) == (3, n_bytes, ())
    assert files(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([one.parent.name, "photo.prefix", "0123"])
    assert (one.parent / "notes.txt").read_text() == "mine"


def test_clear_says_what_it_could_not_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, unlink = filled(tmp_path, 1, 2), Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == made[0]:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    cleared = clear(tmp_path)
    assert (cleared.n_files, len(cleared.failures)) == (1, 1)
    assert made[0].name in cleared.failures[0]


def test_folders_of_another_user_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = filled(tmp_path, 1)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert shelves(tmp_path) == []
    assert bound(tmp_path, 0, 0) == ([], [])
    assert clear(tmp_path).n_files == 0
    assert path.exists()
