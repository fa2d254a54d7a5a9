"""A name or an address becomes an installed model, or an error that names every source; never a partial model."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import DownloadFailed, HashMismatch, ModelNotFound, StoreError
from models.store.catalog import Catalog, CatalogEntry
from models.store.pull import name_of, pull
from models.store.store import Store, StoredModel
from tests.support.convert.tiny import write_model
from tests.support.models.build import fill
from tests.support.models.hub import COMMIT, FILE, REPO, Hub

URI = f"hf://{REPO}/{FILE}"
MISSING = "dist://deskside-not-there/x"


def catalog(hub: Hub, *sources: str) -> Catalog:
    entry = CatalogEntry(
        name="tiny",
        description="A tiny model",
        licence="MIT",
        licence_notice="Be kind",
        file="tiny.gguf",
        quantization="Q8_0",
        size_bytes=len(hub.content),
        sha256=hub.sha256,
        sources=sources,
        hint="install its data packages",
    )
    return Catalog((entry, CatalogEntry(name="made", description="d", licence="MIT", recipe="made")))


def left_over(store: Store) -> list[Path]:
    return [path for path in store.home.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_known_model_is_installed_from_the_first_source_that_delivers(hub: Hub, store: Store) -> None:
    stored = pull("tiny", store, catalog=catalog(hub, MISSING, URI))
    assert stored.gguf.read_bytes() == hub.content
    assert stored.gguf.name == "tiny.gguf"
    assert stored.manifest is not None
    assert stored.manifest.source == f"{URI}@main"
    card = (stored.folder / "README.md").read_text()
    assert all(text in card for text in ("A tiny model", "MIT", "Be kind", hub.sha256))
    store.verify("tiny")
    assert pull("tiny", store, catalog=catalog(hub, MISSING)) == stored
    assert len(hub.gets) == 1


def test_when_no_source_delivers_each_is_named_with_its_reason(hub: Hub, store: Store) -> None:
    with pytest.raises(DownloadFailed) as refused:
        pull("tiny", store, catalog=catalog(hub, MISSING, f"hf://{REPO}/gone.gguf"))
    reasons = str(refused.value).splitlines()
    assert reasons[0] == "no source delivered 'tiny':"
    assert "not installed: deskside-not-there" in reasons[1]
    assert f"hf://{REPO}/gone.gguf@main" in reasons[2]
    assert reasons[3] == "install its data packages"
    assert left_over(store) == []


def test_wrong_content_is_refused_and_leaves_nothing(hub: Hub, store: Store) -> None:
    hub.delivered = hub.content[:-1] + b"!"
    for wanted in ("tiny", URI):
        with pytest.raises(HashMismatch, match=hub.sha256):
            pull(wanted, store, catalog=catalog(hub, URI))
    assert store.names() == []
    assert left_over(store) == []


def test_any_file_of_the_hub_is_pinned_to_its_commit_and_hash(hub: Hub, store: Store) -> None:
    stored = pull(URI, store)
    assert stored.name == "tiny-q8_0"
    assert stored.manifest is not None
    assert stored.manifest.source == f"{URI}@{COMMIT}"
    assert stored.manifest.artefacts[0].sha256 == hub.sha256
    assert stored.manifest.artefacts[0].quantization == "Q8_0"
    assert REPO in stored.manifest.licence
    assert pull(URI, store) == stored
    assert pull(URI, store, name="mine").name == "mine"
    with pytest.raises(StoreError, match=r"'mine' is installed from .*--name"):
        pull(f"hf://team/another/{FILE}", store, name="mine")


def test_a_file_that_is_not_gguf_is_refused(store: Store, hub: Hub) -> None:
    hub.content = b"<html>not a model</html>"
    with pytest.raises(DownloadFailed, match="not a GGUF file: it starts with b'<htm'"):
        pull(URI, store)
    assert left_over(store) == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "X Y"])
def test_hostile_names_are_refused_before_any_request(hub: Hub, store: Store, name: str) -> None:
    with pytest.raises((StoreError, ModelNotFound), match=r"not a model name|no file or folder"):
        pull(name, store)
    with pytest.raises(StoreError, match="not a model name"):
        pull(URI, store, name=name)
    assert (hub.heads, hub.gets) == ([], [])


def test_a_source_that_cannot_be_pulled_names_the_alternatives(hub: Hub, store: Store) -> None:
    with pytest.raises(ModelNotFound, match=r"'nope'.*made, tiny.*hf://"):
        pull("nope", store, catalog=catalog(hub, URI))
    with pytest.raises(DownloadFailed, match="hf://owner/name"):
        pull("https://example.org/x.gguf", store)
    with pytest.raises(DownloadFailed, match="hf://owner/name"):
        pull(MISSING, store)
    with pytest.raises(StoreError, match="--name"):
        pull("tiny", store, name="other")


def test_a_recipe_is_passed_to_build(hub: Hub, store: Store) -> None:
    known = catalog(hub, URI)
    with pytest.raises(StoreError, match="deskside convert made"):
        pull("made", store, catalog=known)

    def build(entry: CatalogEntry, into: Store) -> StoredModel:
        with into.staging(entry.name) as folder:
            fill(folder, entry.name)
        return into.get(entry.name)

    assert pull("made", store, catalog=known, build=build).name == "made"
    assert pull("made", store, catalog=known).name == "made"
    asked: list[str] = []

    def again(entry: CatalogEntry, into: Store) -> StoredModel:
        asked.append(entry.name)
        return into.get(entry.name)

    assert pull("made", store, catalog=known, build=again).name == "made"
    pull("tiny", store, catalog=known, build=again)
    pull("tiny", store, catalog=known, build=again)
    assert asked == ["made"], "who builds a recipe knows whether an installed model still is the recipe's"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Gemma-3-270M-it-Q8_0.gguf", "gemma-3-270m-it-q8_0"),
        ("a/b/My Model (v2).gguf", "my-model-v2"),
        ("ü.gguf", None),
    ],
)
def test_a_file_gets_a_name_that_the_store_takes(path: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(StoreError):
            name_of(path)
    else:
        assert name_of(path) == name


def test_two_processes_share_the_download_of_a_model(hub: Hub, store: Store) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from models.store.pull import pull; from models.store.store import Store\n"
        "print('begin', flush=True); print(pull(sys.argv[1], Store(Path(sys.argv[2]))).gguf)"
    )
    hub.may_answer.clear()
    command = [sys.executable, "-c", script, URI, str(store.home)]
    first, second = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    with first, second:
        assert first.stdout is not None
        assert second.stdout is not None
        assert [first.stdout.readline(), second.stdout.readline()] == ["begin\n", "begin\n"]
        assert hub.first_get.wait(60)
        hub.may_answer.set()
        told = {first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]}
    assert (first.returncode, second.returncode) == (0, 0)
    assert told == {f"{store.get('tiny-q8_0').gguf}\n"}
    assert len(hub.gets) == 1
    store.verify("tiny-q8_0")


def test_a_killed_pull_leaves_no_partial_model(hub: Hub, store: Store) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from models.store.pull import pull; from models.store.store import Store\n"
        "pull(sys.argv[1], Store(Path(sys.argv[2])))"
    )
    hub.may_answer.clear()
    with subprocess.Popen([sys.executable, "-c", script, URI, str(store.home)]) as process:
        assert hub.first_get.wait(60)
        assert store.names() == []
        process.kill()
    hub.may_answer.set()
    assert store.names() == []
    assert pull(URI, store).gguf.read_bytes() == hub.content
    assert [path.name for path in (store.home / "staging").iterdir() if path.is_dir()] == []


def test_a_file_of_this_disk_is_installed_as_it_is(store: Store, tmp_path: Path) -> None:
    file = write_model(tmp_path / "My Mails-Q4_1.GGUF")
    stored = pull(str(file), store)
    assert stored.name == "my-mails-q4_1"
    assert stored.gguf.read_bytes() == file.read_bytes()
    assert stored.manifest is not None
    assert stored.manifest.artefacts[0].quantization == "Q4_1"
    assert stored.manifest.licence == "tiny-licence"
    store.verify(stored.name)
    assert "deskside chat" not in (stored.folder / "README.md").read_text(), "it has no chat template"
    chats = pull(str(write_model(tmp_path / "chats.gguf", template="{{ messages }}")), store)
    assert "deskside chat chats" in (chats.folder / "README.md").read_text()
    store.remove("chats")
    assert pull(str(file), store, name="Mails").name == "Mails"
    assert pull(str(file), store, name="Mails") == store.get("Mails")
    other = write_model(tmp_path / "other.gguf", "llama")
    with pytest.raises(StoreError, match="'Mails' is installed already"):
        pull(str(other), store, name="Mails")
    words = tmp_path / "words.txt"
    words.write_text("no model")
    with pytest.raises(DownloadFailed, match=r"words\.txt' is a text file, not a GGUF file$"):
        pull(str(words), store)
    for given, said in {
        str(tmp_path): "is a folder without model.toml; give its file: chats.gguf, other.gguf$",
        str(tmp_path / "gone.gguf"): r"there is no file or folder .*gone\.gguf'$",
        str(stored.folder): "is a model's folder; it can be served as it is: deskside serve /",
    }.items():
        with pytest.raises(ModelNotFound, match=said):
            pull(given, store)
    assert store.names() == ["Mails", "my-mails-q4_1"]
