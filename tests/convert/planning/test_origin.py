"""What SOURCE may be: a folder, a repository on the Hub, a model of the store; and what it is known by."""

from pathlib import Path

import pytest

from convert.errors import RequestInvalid
from convert.planning.origin import find_origin, folder_digest
from models.errors import ModelNotFound
from models.store.catalog import HubRepo
from models.store.store import Store
from tests.convert.test_pipeline import Notes
from tests.support.convert.hf_tiny import write_folder, write_shards
from tests.support.convert.tiny import write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_a_folder_is_its_own_tokenizer_and_is_known_by_its_files(store: Store, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "mine")
    origin = find_origin(str(folder), None, store, Notes())
    assert (origin.path, origin.folder, origin.base.name) == (folder, folder, "mine")
    sha256 = origin.base.sha256
    (folder / "notes.txt").write_text("of no matter")
    assert folder_digest(folder).result() == sha256
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert folder_digest(folder).result() != sha256


def test_a_repository_is_fetched_whole_and_named_by_its_commit(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "cache" / COMMIT)
    asked: list[HubRepo] = []

    def fetch(repo: HubRepo, progress: object) -> Path:
        asked.append(repo)
        return folder

    monkeypatch.setattr("convert.planning.origin.fetch_checkpoint", fetch)
    origin = find_origin("hf://team/tiny@v2", None, store, Notes())
    assert asked == [HubRepo("team/tiny", "v2")]
    assert origin.path == folder
    assert (origin.base.name, origin.base.source, origin.base.revision) == ("tiny", f"hf://team/tiny@{COMMIT}", COMMIT)


def test_a_gguf_file_has_its_own_tokenizer(store: Store, tmp_path: Path) -> None:
    origin = find_origin(str(write_model(tmp_path / "base.gguf")), None, store, Notes())
    assert (origin.folder, origin.base.name) == (None, "base")
    assert origin.licence == "tiny-licence"


def test_weights_made_elsewhere_need_their_folder(store: Store, tmp_path: Path) -> None:
    gguf = write_model(tmp_path / "base.gguf")
    folder = write_folder(tmp_path / "mine")
    origin = find_origin(str(folder), gguf, store, Notes())
    assert (origin.path, origin.folder) == (gguf, folder)
    with pytest.raises(RequestInvalid, match=r"SOURCE is the folder 'base\.gguf' was made from"):
        find_origin("gemma-3-270m", gguf, store, Notes())


def test_what_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nothing-here"):
        find_origin(str(tmp_path / "nothing-here"), None, store, Notes())
