"""What a loaded model is served with."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.store import StoredModel
from runtime import served
from runtime.config import RuntimeConfig
from runtime.errors import ContextTooLong, LoadFailed
from runtime.worker_process import ProcessHost
from tests.engine_process import alive
from tests.fakes import FakeTokenizer
from tests.toy_engine import FakeRecipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRecipe:
    """Of the engine that stands for the real one."""
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
    loaded = ProcessHost.await_loaded
    monkeypatch.setattr(
        ProcessHost, "await_loaded", lambda host: replace(loaded(host), n_ctx=512, n_ctx_train=n_ctx_train)
    )
    model = served.load_model(stored(recipe.folder), RuntimeConfig())
    model.worker.stop()
    assert model.prompter.limit([1] * 10, None, param="max_tokens") == holds - 10
    with pytest.raises(ContextTooLong, match=f"holds {holds} tokens"):
        model.prompter.limit([1] * holds, None, param="max_tokens")


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
