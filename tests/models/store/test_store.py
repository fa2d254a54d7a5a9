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
        lambda: store.rollback(name),
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


class Killed(BaseException):
    """Ends an exchange of folders as SIGKILL does: nothing is tidied."""


def content(store: Store, name: str = "tiny") -> bytes:
    return store.get(name).gguf.read_bytes()


def before(store: Store, name: str = "tiny") -> bytes | None:
    kept = store.previous(name)
    return kept.gguf.read_bytes() if kept is not None else None


def kill_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Kill this "process" at its rename of that number: it and all later ones are not done, nor is anything deleted."""
    done = 0
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done >= number:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr("models.store.previous.discard", lambda path: None)


RENAMES = 3
"""The model before the installed one, the installed one, the new one."""


@pytest.mark.parametrize("number", range(1, RENAMES + 2))
@pytest.mark.parametrize("seen_by", ["get", "resolve", "names", "staging"])
def test_a_kill_between_renames_leaves_the_old_model_or_the_new_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, seen_by: str
) -> None:
    for made in (b"GGUF 1", b"GGUF 2"):
        install(store, content=made, replace=True)
    with monkeypatch.context() as patch:
        kill_at_rename(patch, number)
        if number <= RENAMES:
            with pytest.raises(Killed):
                install(store, content=b"GGUF 3", replace=True)
        else:
            install(store, content=b"GGUF 3", replace=True)
    expected = (b"GGUF 2", b"GGUF 1") if number <= RENAMES else (b"GGUF 3", b"GGUF 2")
    if seen_by == "get":
        assert content(store) == expected[0]
    elif seen_by == "resolve":
        assert store.resolve("tiny").gguf.read_bytes() == expected[0]
    elif seen_by == "names":
        assert store.names() == ["tiny"]
    else:
        with pytest.raises(StoreError, match="'tiny' is installed already"):
            install(store)
    assert (content(store), before(store)) == expected
    assert [path.name for path in (store.home / "previous").iterdir()] == ["tiny"]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_kill_between_the_renames_of_a_rollback_loses_neither(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for made in (b"GGUF 1", b"GGUF 2"):
        install(store, content=made, replace=True)
    with monkeypatch.context() as patch:
        kill_at_rename(patch, number)
        if number <= RENAMES:
            with pytest.raises(Killed):
                store.rollback("tiny")
        else:
            store.rollback("tiny")
    assert store.names() == ["tiny"]
    expected = (b"GGUF 2", b"GGUF 1") if number == 1 else (b"GGUF 1", b"GGUF 2")
    assert (content(store), before(store)) == expected


def test_rolling_back_swaps_with_the_model_that_was_replaced(store: Store) -> None:
    for made in (b"GGUF 1", b"GGUF 2", b"GGUF 3"):
        install(store, content=made, replace=True)
    assert (content(store), before(store)) == (b"GGUF 3", b"GGUF 2")
    assert store.names() == ["tiny"], "the one that is kept is no model"
    with store.get("tiny").gguf.open("rb") as served:
        assert store.rollback("tiny").gguf.read_bytes() == b"GGUF 2"
        assert served.read() == b"GGUF 3", "a server keeps the file that it has open"
    assert before(store) == b"GGUF 3"
    assert store.rollback("tiny").gguf.read_bytes() == b"GGUF 3"
    assert before(store) == b"GGUF 2"
    store.verify("tiny")


def test_the_same_files_again_leave_the_version_before(store: Store) -> None:
    for made in (b"GGUF 1", b"GGUF 2", b"GGUF 2"):
        install(store, content=made, replace=True)
    assert (content(store), before(store)) == (b"GGUF 2", b"GGUF 1")
    assert staged(store) == []


def test_a_damaged_model_is_not_kept_in_place_of_a_whole_one(store: Store) -> None:
    for made in (b"GGUF 1", b"GGUF 2"):
        install(store, content=made, replace=True)
    store.get("tiny").gguf.unlink()
    install(store, content=b"GGUF 3", replace=True)
    assert (content(store), before(store)) == (b"GGUF 3", b"GGUF 1")


def test_a_damaged_model_is_rolled_back_and_a_damaged_version_is_not_brought_back(store: Store) -> None:
    for made in (b"GGUF 1", b"GGUF 2"):
        install(store, content=made, replace=True)
    store.get("tiny").gguf.unlink()
    assert store.rollback("tiny").gguf.read_bytes() == b"GGUF 1"
    assert store.previous("tiny") is None
    with pytest.raises(BadManifest, match=r"tiny\.gguf.*no such file"):
        store.rollback("tiny")
    assert content(store) == b"GGUF 1"


def test_what_cannot_be_rolled_back_says_why(store: Store) -> None:
    install(store)
    assert store.previous("tiny") is None
    with pytest.raises(ModelNotFound, match="nothing to roll 'tiny' back to"):
        store.rollback("tiny")
    with pytest.raises(ModelNotFound, match=r"no model named 'tinny' is installed; installed: tiny; did you mean"):
        store.rollback("tinny")


def test_a_disk_that_refuses_a_rename_leaves_both(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (b"GGUF 1", b"GGUF 2"):
        install(store, content=made, replace=True)

    def refused(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(StoreError, match=r"cannot be written: .*No space left"):
            store.rollback("tiny")
    assert (content(store), before(store)) == (b"GGUF 2", b"GGUF 1")


def test_removing_takes_the_version_before_with_it(store: Store) -> None:
    install(store)
    assert not store.remove("tiny")
    for made in (b"GGUF 1", b"GGUF 2"):
        install(store, content=made, replace=True)
    assert store.remove("tiny")
    assert store.names() == []
    assert list((store.home / "previous").iterdir()) == []
    install(store)
    assert store.previous("tiny") is None


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
