"""What a loaded model is served with."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.store import StoredModel
from runtime import served
from runtime.config import RuntimeConfig
from runtime.errors import ContextTooLong
from tests.fakes import FakeLlama


@pytest.mark.parametrize(("n_ctx_train", "holds"), [(64, 64), (4096, 512), (0, 512)])
def test_no_answer_grows_beyond_the_cache_or_the_trained_length(
    monkeypatch: pytest.MonkeyPatch, n_ctx_train: int, holds: int
) -> None:
    llama = FakeLlama(n_ctx=512)
    llama.info = replace(llama.info, n_ctx_train=n_ctx_train)
    monkeypatch.setattr(served, "load", lambda *_: llama)
    model = served.load_model(StoredModel("toy", Path(), None, Path("toy.gguf")), RuntimeConfig())
    assert model.prompter.limit([1] * 10, None, param="max_tokens") == holds - 10
    with pytest.raises(ContextTooLong, match=f"holds {holds} tokens"):
        model.prompter.limit([1] * holds, None, param="max_tokens")
