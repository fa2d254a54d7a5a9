"""`deskside cache` lists and clears the folder of prefixes that is named, by argument or variable."""

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.cli.cache import VARIABLE, human_time
from runtime.cli.main import main
from tests.support.runtime.prefixes import IDENTITY, files, keep, store


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prefixes of two models; those of `old` were last used an hour before those of `new`, three days ago."""
    monkeypatch.delenv(VARIABLE, raising=False)
    for model, n_files, days in (("old", 1, 3 + 1 / 24), ("new", 2, 3)):
        disk = store(tmp_path, identity=replace(IDENTITY, model=model, computing=f"{model}, 4 threads"))
        before = set(files(tmp_path))
        keep(disk, *range(n_files))
        disk.close()
        for path in set(files(tmp_path)) - before:
            used_s = time.time() - days * 86400
            os.utime(path, (used_s, used_s))
    return tmp_path


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main(["cache", *argv])
    out, err = capsys.readouterr()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, out, err


def test_list_shows_each_model_last_used_first(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = run("list", str(filled), capsys=capsys)
    assert (code, err) == (0, "")
    _, new, old = out.splitlines()
    assert new.split()[:3] == ["new", "2", "100"]
    assert new.endswith("3 days ago  llama-cpp-python 0.3, new, 4 threads" + " " * (len(new) - len(new.rstrip())))
    assert old.split()[:3] == ["old", "1", "50"]


def test_list_as_json_names_the_folder_and_sums(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(filled)[0].write_bytes(b"damaged")
    code, out, _ = run("list", str(filled), "--json", capsys=capsys)
    listed = json.loads(out)
    assert (code, listed["folder"]) == (0, str(filled))
    rows = {row["model"]: row for row in listed["prefixes"]}
    assert rows.keys() == {"old", "new"}
    assert sum(row["damaged"] for row in rows.values()) == 1
    assert sum(row["files"] for row in rows.values()) == 3
    assert sum(row["bytes"] for row in rows.values()) == 7 + 2 * 2328
    assert rows["old"]["sha256"] == IDENTITY.sha256
    assert "3 days" in human_time(min(row["idle_seconds"] for row in rows.values() if not row["damaged"]))


def test_a_model_whose_description_is_lost_is_listed_by_its_folder(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in filled.glob("*/identity.json"):
        path.unlink()
    _, out, _ = run("list", str(filled), capsys=capsys)
    assert out.count("unknown") == 2
    assert all(folder.name[:12] in out for folder in filled.iterdir())


def test_the_folder_can_come_from_the_variable(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(filled))
    assert "new" in run("list", capsys=capsys)[1]
    code, out, err = run("clear", capsys=capsys)
    assert (code, out, err) == (0, "", f"{str(filled)!r}: 3 files deleted, 0 MiB\n")
    assert list(filled.iterdir()) == []
    code, out, err = run("list", capsys=capsys)
    assert (code, out, err) == (0, "", f"no prefixes are kept in {str(filled)!r}\n")


def test_what_cannot_be_deleted_is_named_and_the_rest_is_gone(
    filled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, unlink = files(filled)[1], Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == kept:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    code, _, err = run("clear", str(filled), capsys=capsys)
    assert code == 3
    assert f"not deleted: {str(kept)!r}: Operation not permitted" in err
    assert "2 files deleted" in err
    assert files(filled) == [kept]


@pytest.mark.parametrize("verb", ["list", "clear"])
def test_no_folder_is_a_usage_error_and_a_missing_one_a_failure(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(verb, capsys=capsys)
    assert (code, out) == (2, "")
    assert VARIABLE in err
    code, out, err = run(verb, str(tmp_path / "none"), capsys=capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: there is no folder {str(tmp_path / 'none')!r}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7200, "2 hours"), (172_800, "2 days")],
)
def test_times_have_readable_units(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
