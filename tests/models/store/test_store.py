"""A model is in the store completely or not at all, after any interruption; names do not lead out of the store."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.common.files import default_home
from models.errors import BadManifest, HashMismatch, ModelError, ModelNotFound, StoreError
from models.manifest import MANIFEST_FILE
from models.store.store import Store
from tests.support.convert.tiny import write_model
from tests.support.models.build import CONTENT, fill

HOSTILE = ["../x", "x/../../y", "/etc", "", ".", "..", ".hidden", "a b", "x\n", "x" * 65, "a\\b"]


def install(
    store: Store,
    name: str = "tiny",
    content: bytes = CONTENT,
    *,
    replace: bool = False,
    then: Callable[[Path], object] = lambda folder: None,
) -> None:
    with store.staging(name, replace=replace) as folder:
        fill(folder, name, content)
        then(folder)


def staged(store: Store) -> list[Path]:
    return [path for path in (store.home / "staging").iterdir() if path.is_dir()]


def test_an_installed_model_is_listed_found_and_removed(store: Store) -> None:
    assert store.names() == []
    install(store)
    install(store, "other")
    assert store.names() == ["other", "tiny"]
    assert [store.get(name).name for name in store.names()] == ["other", "tiny"]
    found = store.get("tiny")
    assert found.gguf.read_bytes() == CONTENT
    assert found.manifest is not None
    assert found.manifest.licence == "MIT"
    store.verify("tiny")
    store.remove("tiny")
    assert store.names() == ["other"]
    assert not found.gguf.exists()
    assert staged(store) == []


def test_resolve_takes_a_name_a_folder_or_a_file(store: Store, tmp_path: Path) -> None:
    install(store)
    fill(tmp_path, "elsewhere")
    assert store.resolve("tiny") == store.get("tiny")
    assert store.resolve(tmp_path).name == "elsewhere"
    bare = store.resolve(str(tmp_path / "tiny.gguf"))
    assert (bare.name, bare.folder, bare.manifest) == ("tiny", tmp_path, None)


@pytest.mark.parametrize("name", ["Tiny.GGUF", "sha256-0123abcd", "model.bin"])
def test_a_gguf_file_is_known_by_its_content(store: Store, tmp_path: Path, name: str) -> None:
    """Ollama's blobs and caches have no suffix, other tools write it in capitals."""
    file = write_model(tmp_path / name)
    assert store.resolve(str(file)).gguf == file
    assert store.resolve(file).name == file.stem
    other = tmp_path / "words.bin"
    other.write_bytes(b"GGU, but no model")
    with pytest.raises(ModelNotFound, match="is a text file, not a GGUF file"):
        store.resolve(other)


def test_an_unresolved_name_lists_the_installed_models_and_the_fix(store: Store) -> None:
    with pytest.raises(ModelNotFound, match=r"'gone'.*no model is installed; the catalogue has .*email-triage"):
        store.resolve("gone")
    install(store)
    with pytest.raises(ModelNotFound, match="installed: tiny"):
        store.resolve("/nowhere/model.gguf")
    with pytest.raises(ModelNotFound, match="installed: tiny"):
        store.get("gone")
    with pytest.raises(ModelNotFound, match="'gone'"):
        store.remove("gone")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("email-triage", r"; try: deskside pull email-triage$"),
        ("emailtriage", r"; did you mean 'email-triage'\? \(deskside pull email-triage\)$"),
        ("Gemma", r"; did you mean 'gemma-3-270m'\? \(deskside pull gemma-3-270m\)$"),
        ("tinny", r"; did you mean 'tiny'\?$"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_one_that_was_meant(store: Store, name: str, said: str) -> None:
    install(store)
    with pytest.raises(ModelNotFound, match=said):
        store.resolve(name)


def test_a_wrong_path_is_answered_with_what_lies_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("adapter/adapter_config.json", "trained/config.json", "files/a.gguf", "empty/x.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    (tmp_path / "trained/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "mail.csv").write_text("text,label\na,b\n")
    for given, said in {
        "adapter": "with a LoRA adapter; to make a model of it: deskside convert BASE --adapter adapter;",
        "trained": "with a checkpoint; to make a model of it: deskside convert trained;",
        "files": "'files' is a folder without model.toml; give its file: a.gguf;",
        "empty": "'empty' is a folder without model.toml and GGUF file;",
        "mail.csv": "'mail.csv' is a CSV file, not a GGUF file;",
        "trained/model.safetensors": "is a safetensors file, not a GGUF file; .*: deskside convert trained;",
        "gone.gguf": "there is no file or folder 'gone.gguf';",
        "./gone/away": "there is no file or folder './gone/away';",
        "google/gemma-3-270m": "for a model of the Hub: deskside convert hf://google/gemma-3-270m;",
        "hf://a/b/c.gguf": "is an address, not an installed model; try: deskside pull hf://a/b/c.gguf;",
        "hf://a/b@main": "try: deskside convert hf://a/b@main;",
    }.items():
        with pytest.raises(ModelNotFound, match=said + " no model is installed$"):
            store.resolve(given)


def test_removing_suggests_what_is_installed_only(store: Store) -> None:
    install(store)
    with pytest.raises(ModelNotFound, match=r"did you mean 'tiny'\?$"):
        store.remove("tinyy")
    with pytest.raises(ModelNotFound, match=r"installed: tiny$"):
        store.remove("email-triage")


def test_a_recipe_that_is_not_built_cannot_be_resolved(store: Store, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text('name = "recipe"\nlicence = "MIT"\n', encoding="utf-8")
    with pytest.raises(ModelNotFound, match="deskside convert recipe"):
        store.resolve(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_everywhere(store: Store, name: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: store.get(name),
        lambda: store.verify(name),
        lambda: store.remove(name),
        lambda: store.staging(name).__enter__(),
        lambda: store.exclusive(name).__enter__(),
    ]
    for use in uses:
        with pytest.raises(StoreError) as refused:
            use()
        assert repr(name) in str(refused.value)
    with pytest.raises(ModelNotFound):
        store.resolve(name)


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_installation_leaves_nothing(store: Store, interruption: type[BaseException]) -> None:
    def interrupt(folder: Path) -> None:
        raise interruption

    with pytest.raises(interruption):
        install(store, then=interrupt)
    assert store.names() == []
    assert staged(store) == []


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda folder: (folder / "tiny.gguf").write_bytes(CONTENT[:-1] + b"!"), HashMismatch, r"tiny\.gguf.*sha256"),
        (lambda folder: (folder / "tiny.gguf").write_bytes(CONTENT[:-1]), BadManifest, f"{len(CONTENT) - 1} bytes"),
        (lambda folder: (folder / "tiny.gguf").unlink(), BadManifest, "no such file"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), BadManifest, "cannot be read"),
        (lambda folder: fill(folder, "other"), BadManifest, "'other'.*'tiny'"),
        (
            lambda folder: (folder / MANIFEST_FILE).write_text('name = "tiny"\nlicence = "MIT"\n', encoding="utf-8"),
            BadManifest,
            "no artefact",
        ),
    ],
)
def test_files_that_contradict_the_manifest_are_not_installed(
    store: Store, harm: Callable[[Path], object], error: type[ModelError], message: str
) -> None:
    with pytest.raises(error, match=message):
        install(store, then=harm)
    assert store.names() == []
    assert staged(store) == []


def test_verify_finds_a_file_that_changed_later(store: Store) -> None:
    install(store)
    store.get("tiny").gguf.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(HashMismatch, match=r"tiny\.gguf.*fix: deskside models remove tiny"):
        store.verify("tiny")


def test_a_taken_name_is_refused_unless_it_is_to_be_replaced(store: Store) -> None:
    install(store)
    with pytest.raises(StoreError, match="'tiny' is installed already"):
        install(store, content=b"GGUF new")
    install(store, content=b"GGUF new", replace=True)
    assert store.get("tiny").gguf.read_bytes() == b"GGUF new"
    assert staged(store) == []


def test_a_name_taken_while_staging_is_refused_too(store: Store) -> None:
    with pytest.raises(StoreError, match="'tiny' is installed already"):
        install(store, content=b"GGUF late", then=lambda folder: install(store))
    assert store.get("tiny").gguf.read_bytes() == CONTENT


def test_a_replacement_that_fails_leaves_the_old_model(store: Store) -> None:
    install(store)
    with pytest.raises(HashMismatch):
        install(store, replace=True, content=b"GGUF new", then=lambda new: (new / "tiny.gguf").write_bytes(b"GGUF bad"))
    assert store.get("tiny").gguf.read_bytes() == CONTENT


def test_only_the_leftovers_of_dead_processes_are_removed(store: Store) -> None:
    script = (
        "import sys; from pathlib import Path; from models.store.store import Store\n"
        "with Store(Path(sys.argv[1])).staging('half') as folder:\n"
        "    (folder / 'part.gguf').write_bytes(b'GGUF'); print(folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(store.home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        install(store, "first")
        assert folder.is_dir(), "the folder of a living process was swept"
        process.send_signal(signal.SIGKILL)
    install(store, "second")
    assert not folder.exists()
    assert store.names() == ["first", "second"]


def test_a_replacement_interrupted_by_sigkill_is_undone(store: Store) -> None:
    install(store)
    aside = store.home / "staging" / "tiny.0123" / "replaced" / "tiny"
    aside.parent.mkdir(parents=True)
    (store.home / "models" / "tiny").rename(aside)
    assert store.names() == []
    install(store, "other")
    assert store.names() == ["other", "tiny"]
    store.verify("tiny")


def test_removing_a_link_leaves_what_it_points_to(store: Store, tmp_path: Path) -> None:
    install(store)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fill(elsewhere, "linked")
    (store.home / "models" / "linked").symlink_to(elsewhere, target_is_directory=True)
    store.remove("linked")
    assert store.names() == ["tiny"]
    assert (elsewhere / "tiny.gguf").read_bytes() == CONTENT


def test_a_folder_renamed_by_hand_is_refused(store: Store) -> None:
    install(store)
    (store.home / "models" / "tiny").rename(store.home / "models" / "renamed")
    with pytest.raises(BadManifest, match=r"'tiny'; rename"):
        store.get("renamed")


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="DESKSIDE_HOME"), Store(tmp_path / "file").staging("tiny"):
        pass


def test_home_is_the_environments_or_the_platforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DESKSIDE_HOME", str(tmp_path))
    assert default_home() == tmp_path
    assert Store().home == tmp_path
    monkeypatch.delenv("DESKSIDE_HOME")
    assert default_home().name == "deskside"


def test_names_may_have_capitals_but_not_differ_by_them_alone(store: Store, tmp_path: Path) -> None:
    with store.staging("Qwen2.5-Mails") as folder:
        fill(folder, "Qwen2.5-Mails")
    assert store.get("Qwen2.5-Mails").name == "Qwen2.5-Mails"
    with (
        pytest.raises(StoreError, match=r"differs from the installed '.*' in capitals only"),
        store.staging("qwen2.5-mails"),
    ):
        pytest.fail("nothing is built under such a name")
