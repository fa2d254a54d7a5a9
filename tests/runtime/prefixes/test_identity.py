"""Another file, library or way of computing is another identity; a file is hashed once for as long as it stays."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.prefixes import identity as module
from runtime.prefixes.identity import FileHashes, Identity
from tests.support.runtime.prefixes import IDENTITY


def test_all_but_the_name_make_the_identity() -> None:
    others = [replace(IDENTITY, **{field: "0" * 64}) for field in ("sha256", "library", "computing")]
    assert len({IDENTITY.digest, *(other.digest for other in others)}) == 4
    assert replace(IDENTITY, model="another name").digest == IDENTITY.digest
    assert (
        replace(IDENTITY, library="a", computing="bc").digest != replace(IDENTITY, library="ab", computing="c").digest
    )


def test_another_format_of_snapshots_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = IDENTITY.digest
    monkeypatch.setattr(module, "VERSION", 2)
    assert IDENTITY.digest != before


def test_an_identity_is_read_back() -> None:
    assert Identity.from_json(IDENTITY.to_json()) == IDENTITY


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"a": 1}', b"\xff"])
def test_a_damaged_description_is_none(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        Identity.from_json(text)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed."""
    calls: list[Path] = []

    def sha256_file(path: Path) -> str:
        calls.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(module, "sha256_file", sha256_file)
    return calls


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, hashed: list[Path]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [FileHashes(tmp_path / "hashes").sha256(model) for _ in range(3)] == [expected] * 3
    assert hashed == [model]
    state = model.stat()
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns))  # as `cp -p` of a file with the same size
    other = tmp_path / "other.gguf"
    other.write_bytes(b"WEIGHTS")
    other.replace(model)
    assert FileHashes(tmp_path / "hashes").sha256(model) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_damaged_hash_is_computed_again(tmp_path: Path, hashed: list[Path]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    hashes = FileHashes(tmp_path / "hashes")
    expected = hashes.sha256(model)
    [place] = (tmp_path / "hashes").iterdir()
    place.write_text(expected[:-1] + "\n")
    assert [hashes.sha256(model), hashes.sha256(model)] == [expected] * 2
    assert len(hashed) == 2


def test_a_folder_that_cannot_be_written_costs_the_memory_only(tmp_path: Path, hashed: list[Path]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")
    (tmp_path / "hashes").write_text("a file")
    assert FileHashes(tmp_path / "hashes").sha256(model) == hashlib.sha256(b"weights").hexdigest()
    assert len(hashed) == 1


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"weights")

    def sha256_file(path: Path) -> str:
        path.write_bytes(b"other weights")
        return "00" * 32

    monkeypatch.setattr(module, "sha256_file", sha256_file)
    FileHashes(tmp_path / "hashes").sha256(model)
    assert not (tmp_path / "hashes").exists()
