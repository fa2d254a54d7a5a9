"""What a loaded model is served with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from models.manifest import Artefact, Base, Manifest
from models.store.store import StoredModel
from runtime.config import RuntimeConfig
from runtime.errors import ContextTooLong, LoadFailed
from runtime.serving import model as served
from runtime.serving.chat import prepare_chat
from runtime.serving.model import recipe_of
from runtime.serving.names import ModelRef
from runtime.serving.recipe import LlamaRecipe
from runtime.worker.supervisor import EngineSupervisor
from tests.support.runtime.engine_process import alive
from tests.support.runtime.fakes import FakeTokenizer
from tests.support.runtime.toy_engine import FakeRecipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRecipe:
    """The recipe of a fake engine, used instead of the real one."""
    recipe = FakeRecipe(tmp_path)
    monkeypatch.setattr(served, "recipe_of", lambda *_: recipe)
    monkeypatch.setattr(served, "load_tokenizer", lambda _: FakeTokenizer())
    return recipe


def stored(folder: Path) -> StoredModel:
    return StoredModel("toy", folder, None, folder / "toy.gguf")


@pytest.mark.parametrize(("n_ctx_train", "holds"), [(64, 64), (4096, 512), (0, 512)])
def test_no_answer_grows_beyond_the_cache_or_the_trained_length(
    recipe: FakeRecipe, monkeypatch: pytest.MonkeyPatch, n_ctx_train: int, holds: int
) -> None:
    start = EngineSupervisor.start
    monkeypatch.setattr(
        EngineSupervisor, "start", lambda supervisor: replace(start(supervisor), n_ctx=512, n_ctx_train=n_ctx_train)
    )
    model = served.load_model(stored(recipe.folder), RuntimeConfig())
    model.supervisor.stop()
    assert model.prompter.limit([1] * 10, None, param="max_tokens") == holds - 10
    with pytest.raises(ContextTooLong, match=f"context length is {holds} tokens"):
        model.prompter.limit([1] * holds, None, param="max_tokens")


def test_the_fast_mode_reaches_the_engine_and_shows_in_the_fingerprint(recipe: FakeRecipe) -> None:
    config = RuntimeConfig(fast=True)
    made = recipe_of(stored(recipe.folder), config, {})
    assert isinstance(made, LlamaRecipe)
    assert made.engine.fast
    assert not made.load.exact
    model = served.load_model(stored(recipe.folder), config)
    model.supervisor.stop()
    assert model.fingerprint == "deskside-toy-fake-fast"


def test_a_model_without_a_vocabulary_leaves_no_process(recipe: FakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> FakeTokenizer:
        raise LoadFailed("no vocabulary")

    monkeypatch.setattr(served, "load_tokenizer", refuse)
    with pytest.raises(LoadFailed, match="no vocabulary"):
        served.load_model(stored(recipe.folder), RuntimeConfig())
    assert not any(map(alive, recipe.pids))


def test_what_the_engine_says_of_a_file_it_cannot_load_is_the_error(tmp_path: Path) -> None:
    """The real recipe, on a file that is no model."""
    (tmp_path / "toy.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(LoadFailed, match=r"toy\.gguf"):
        served.load_model(stored(tmp_path), RuntimeConfig())


BASE = Manifest(
    name="toy",
    licence="MIT",
    artefacts=(Artefact(file="toy.gguf", quantization="Q8_0", size_bytes=1, sha256="a" * 64),),
)
MAIL = Manifest(
    kind="adapter",
    name="mail",
    licence="MIT",
    base=Base(name="toy", sha256="a" * 64),
    artefacts=(Artefact(file="mail.gguf", quantization="F16", size_bytes=1, sha256="b" * 64),),
    task="classify",
    labels=("ham", "spam"),
)


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}!"])
def test_an_adapter_is_loaded_with_its_base_and_answers_under_its_own_name(
    recipe: FakeRecipe, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    given = list[Mapping[str, Path]]()

    def recipe_of(_: StoredModel, __: RuntimeConfig, adapters: Mapping[str, Path]) -> FakeRecipe:
        given.append(adapters)
        return recipe

    monkeypatch.setattr(served, "recipe_of", recipe_of)
    adapter = StoredModel("mail", Path(), MAIL, Path("mail.gguf"))
    wanted = ModelRef("toy:mail", StoredModel("toy", Path(), BASE, Path("toy.gguf")), adapter, template)
    monkeypatch.setattr(served, "find", lambda *_: wanted)
    model = served.open_model("toy:mail", RuntimeConfig())
    assert given == [{"mail": Path("mail.gguf")}]
    assert (model.name, model.adapter, model.manifest, model.quantization) == ("toy:mail", "mail", MAIL, "Q8_0")
    assert model.fingerprint == f"deskside-{'a' * 12}-{'b' * 12}-fake"
    rendered = model.prompter.render([{"role": "user", "content": "hi"}])
    assert rendered == ("hi!" if template else "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n")
    call = prepare_chat({"messages": [{"role": "user", "content": "hi"}], "n": 2, "model": "toy:mail"}, model)
    assert [work.adapter for work in call.work] == ["mail", "mail"]
    model.supervisor.stop()
