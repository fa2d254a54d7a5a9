"""What a name on the command line means, and which adapter may go on which base."""

import hashlib
import logging
from pathlib import Path

import pytest

from models.errors import BadManifest, HashMismatch, ModelNotFound
from models.manifest import MANIFEST_FILE, Adapter, Artefact, Base, Manifest, dump_manifest
from models.store.store import Store
from runtime.config import RuntimeConfig
from runtime.errors import LoadFailed
from runtime.pool.pool import open_pool
from runtime.serving.model import load_model
from runtime.serving.names import find
from tests.support.models.gguf_heads import GEMMA, LORA, head

GGUF = head(GEMMA)
LORA_GGUF = head({**LORA, "tokenizer.chat_template": "{{ messages }}"})
CHECKPOINT = "c" * 64


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`base`, converted from a checkpoint; `tuned`, merged from base; `other`; and the adapter `mail` for base."""
    store = Store(tmp_path / "home")
    install(store, "base", GGUF, base=Base(name="checkpoint", sha256=CHECKPOINT))
    tuned = head({**GEMMA, "general.name": "tuned"})
    install(store, "tuned", tuned, base=Base(name="base", sha256=sha(GGUF)), adapter=Adapter(path="adapter"))
    install(store, "other", head({**GEMMA, "general.name": "other"}))
    install(store, "mail", LORA_GGUF, kind="adapter", base=Base(name="base", sha256=sha(GGUF)))
    return store


def install(store: Store, name: str, content: bytes, **fields: object) -> None:
    artefact = Artefact(file=f"{name}.gguf", quantization="F16", size_bytes=len(content), sha256=sha(content))
    manifest = Manifest(name=name, licence="MIT", artefacts=(artefact,), **fields)  # type: ignore[arg-type]
    with store.staging(name) as folder:
        (folder / f"{name}.gguf").write_bytes(content)
        (folder / MANIFEST_FILE).write_text(dump_manifest(manifest), encoding="utf-8")


def test_a_name_and_a_path_are_models(store: Store) -> None:
    assert (find("base", store).id, find("base", store).adapter) == ("base", None)
    gguf = store.get("base").gguf
    assert find(str(gguf), store).base.gguf == gguf


def test_a_file_with_a_colon_in_its_name_is_a_file(store: Store, tmp_path: Path) -> None:
    odd = tmp_path / "a:b.gguf"
    odd.write_bytes(GGUF)
    assert (find(str(odd), store).id, find(str(odd), store).adapter) == ("a:b", None)


def test_an_adapter_goes_on_its_base_by_name_or_by_path(store: Store) -> None:
    for base in ("base", str(store.get("base").gguf)):
        wanted = find(f"{base}:mail", store)
        assert (wanted.id, wanted.template) == ("base:mail", "{{ messages }}")
        assert wanted.adapters == {"mail": store.get("mail").gguf}


def test_an_adapter_of_a_checkpoint_goes_on_what_was_converted_from_it(store: Store) -> None:
    install(store, "early", LORA_GGUF, kind="adapter", base=Base(name="checkpoint", sha256=CHECKPOINT))
    assert find("base:early", store).id == "base:early"


@pytest.mark.parametrize("base", ["other", "tuned"])
def test_an_adapter_goes_on_no_other_weights_nor_on_a_fine_tune_of_its_base(store: Store, base: str) -> None:
    with pytest.raises(HashMismatch, match=f"'mail' was trained on 'base' .*{sha(GGUF)[:12]}.*but '{base}' is"):
        find(f"{base}:mail", store)


def test_another_form_of_the_base_is_served_with_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    install(store, "late", LORA_GGUF, kind="adapter", base=Base(name="base", sha256="d" * 64))
    with caplog.at_level(logging.WARNING):
        assert find("base:late", store).id == "base:late"
    assert "another form" in caplog.text


def test_an_adapter_alone_is_refused_with_the_name_to_use(store: Store) -> None:
    for refused in (lambda: find("mail", store), lambda: load_model(store.get("mail"), RuntimeConfig())):
        with pytest.raises(LoadFailed, match="runs on its base only; name it base:mail"):
            refused()
    with pytest.raises(LoadFailed, match="is a LoRA adapter and no model"):
        open_pool([str(store.get("mail").gguf)], RuntimeConfig(), store)


def test_what_cannot_be_put_on_a_base_is_refused(store: Store) -> None:
    with pytest.raises(LoadFailed, match="'other' in 'base:other' is a model of its own"):
        find("base:other", store)
    with pytest.raises(ModelNotFound, match="'nothing'"):
        find("base:nothing", store)
    with pytest.raises(ModelNotFound, match="'nobody'"):
        find("nobody:mail", store)
    install(store, "fake", head(GEMMA), kind="adapter", base=Base(name="base", sha256=sha(GGUF)))
    with pytest.raises(BadManifest, match="is no LoRA adapter"):
        find("base:fake", store)


def test_a_pool_loads_a_base_once_for_all_its_names(store: Store) -> None:
    pool = open_pool(["base:mail", "other", "base", "base"], RuntimeConfig(), store)
    assert list(pool.served) == ["base:mail", "base", "other"]
    assert (pool.default, [slot.name for slot in pool.slots]) == ("base:mail", ["base", "other"])
    assert pool.slots[0].adapters == {"mail": store.get("mail").gguf}
    assert pool.slots[0].need.files == len(GGUF) + len(LORA_GGUF)


def test_two_files_of_one_name_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(GGUF)
    with pytest.raises(LoadFailed, match="two models would be served as 'base'"):
        open_pool(["base", str(tmp_path / "base.gguf")], RuntimeConfig(), store)


def test_an_unknown_name_fails_before_anything_is_loaded(store: Store) -> None:
    with pytest.raises(ModelNotFound, match="'nothing'"):
        open_pool(["base", "nothing"], RuntimeConfig(), store)
