"""A source becomes a verified file, or an error with the reason; a failure leaves nothing behind."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from models.common import files
from models.errors import DownloadFailed, HashMismatch, StoreError
from models.store.catalog import HubFile
from models.store.hub import fetch, look_up
from tests.support.models.hub import COMMIT, FILE, REPO, Hub

SOURCE = f"hf://{REPO}/{FILE}@main"
PARTS = "dist://tiny-part1/tiny_part1/data/a.part00 dist://tiny-part2/tiny_part2/data/a.part01"
WHOLE = b"GGUF first half, second half"


def fetch_all(folder: Path, source: str, **promised: Any) -> Path:
    return fetch(source, folder / "out.gguf", **{"sha256": None, "size_bytes": None, **promised})


def test_a_file_comes_from_the_hub_with_its_hash_and_progress(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    out = fetch_all(tmp_path, SOURCE, sha256=hub.sha256, progress=lambda *at: seen.append(at))
    assert out.read_bytes() == hub.content
    assert seen[-1] == (len(hub.content), len(hub.content))
    assert list(tmp_path.glob(".fetch*")) == []


def test_a_connection_dropped_half_way_is_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The client writes in chunks of 10 MiB; smaller ones let a small file be resumed.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.drop_first_get_at = len(hub.content) // 2
    seen: list[int] = []
    out = fetch_all(tmp_path, SOURCE, sha256=hub.sha256, progress=lambda done, total: seen.append(done))
    assert out.read_bytes() == hub.content
    assert len(hub.gets) == 2
    assert hub.gets[0] is None
    assert hub.gets[1] is not None
    resumed_at = int(hub.gets[1].removeprefix("bytes=").partition("-")[0])
    assert 0 < resumed_at <= len(hub.content) // 2
    assert seen == sorted(seen)
    assert seen[-1] == len(hub.content)


def test_wrong_content_is_refused_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.delivered = hub.content[:-1] + b"!"
    with pytest.raises(HashMismatch, match=f"expected {hub.sha256}"):
        fetch_all(tmp_path, SOURCE, sha256=hub.sha256)
    assert not (tmp_path / "out.gguf").exists()
    assert list(tmp_path.glob(".fetch*")) == []


def test_the_hub_tells_commit_size_and_hash(hub: Hub) -> None:
    facts = look_up(HubFile(REPO, FILE))
    assert (facts.commit, facts.size_bytes, facts.sha256) == (COMMIT, len(hub.content), hub.sha256)


@pytest.mark.parametrize("source", [f"hf://{REPO}/other.gguf", f"hf://{REPO}/{FILE}@nope", f"hf://team/nope/{FILE}"])
def test_what_the_hub_does_not_have_is_a_failed_download(hub: Hub, tmp_path: Path, source: str) -> None:
    for attempt in (lambda: fetch_all(tmp_path, source), lambda: look_up(HubFile(*_split(source)))):
        with pytest.raises(DownloadFailed) as refused:
            attempt()
        assert source.partition("@")[0] in str(refused.value)
    assert hub.gets == []


def _split(source: str) -> tuple[str, str, str]:
    path, _, revision = source.removeprefix("hf://").partition("@")
    owner, name, file = path.split("/")
    return f"{owner}/{name}", file, revision or "main"


def test_a_gated_repository_says_how_to_get_in(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    with pytest.raises(DownloadFailed, match="HF_TOKEN"):
        fetch_all(tmp_path, SOURCE)


def test_offline_mode_is_honoured_and_named(hub: Hub, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from models.store.hub import fetch; from models.errors import *\n"
        "try: fetch(sys.argv[1], Path(sys.argv[2]), sha256=None, size_bytes=None)\n"
        "except DownloadFailed as error: print(error)"
    )
    command = [sys.executable, "-c", script, SOURCE, str(tmp_path / "out.gguf")]
    ran = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert "HF_HUB_OFFLINE is set" in ran.stdout
    assert (hub.heads, hub.gets) == ([], [])


def test_a_file_that_the_hubs_cache_holds_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub-cache" / "models--team--tiny-GGUF"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text(COMMIT)
    (snapshot / "snapshots" / COMMIT).mkdir(parents=True)
    (snapshot / "snapshots" / COMMIT / FILE).write_bytes(hub.content)
    assert fetch_all(tmp_path, SOURCE, sha256=hub.sha256).read_bytes() == hub.content
    assert (hub.heads, hub.gets) == ([], [])
    (snapshot / "snapshots" / COMMIT / FILE).write_bytes(b"GGUF, damaged")
    assert fetch_all(tmp_path, SOURCE, sha256=hub.sha256).read_bytes() == hub.content
    assert len(hub.gets) == 1


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installed distributions, each with one part of WHOLE as a data file; importing them would fail."""
    site = tmp_path / "site"
    for number, content in enumerate((WHOLE[:9], WHOLE[9:]), start=1):
        package = f"tiny_part{number}"
        (site / package / "data").mkdir(parents=True)
        (site / package / "__init__.py").write_text("raise RuntimeError('imported')")
        (site / package / "data" / f"a.part0{number - 1}").write_bytes(content)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{package}/__init__.py,,\n{package}/data/a.part0{number - 1},,\n")
    monkeypatch.setattr(sys, "path", [str(site), sysconfig.get_paths()["purelib"]])
    return site


@pytest.mark.usefixtures("parts")
def test_the_parts_of_installed_distributions_are_joined_in_order(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    sha256 = hashlib.sha256(WHOLE).hexdigest()
    out = fetch_all(tmp_path, PARTS, sha256=sha256, progress=lambda *at: seen.append(at))
    assert out.read_bytes() == WHOLE
    assert seen == [(9, len(WHOLE)), (len(WHOLE), len(WHOLE))]
    with pytest.raises(HashMismatch, match=sha256):
        fetch_all(tmp_path, " ".join(reversed(PARTS.split())), sha256=sha256)


@pytest.mark.usefixtures("parts")
def test_missing_distributions_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match="not installed: gone-a, gone-b"):
        fetch_all(tmp_path, f"{PARTS} dist://gone-a/x dist://gone-b/x")
    with pytest.raises(DownloadFailed, match=r"tiny-part1 1\.0 is installed, but has no file 'x'"):
        fetch_all(tmp_path, "dist://tiny-part1/x")


@pytest.mark.usefixtures("parts")
def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.common.files.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 20 << 20}))
    with pytest.raises(StoreError, match=f"{(5 << 20) + files.MARGIN_BYTES} bytes are needed.* {20 << 20} are free"):
        fetch_all(tmp_path, PARTS, size_bytes=5 << 20)
    fetch_all(tmp_path, PARTS, size_bytes=4 << 20)


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "card.md"
    files.write_atomic(file, "old")
    monkeypatch.setattr("models.common.files.os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
