"""What a loaded model is served with."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.manifest import Artefact, Base, Manifest
from models.store import StoredModel
from runtime import served
from runtime.config import RuntimeConfig
from runtime.errors import ContextTooLong
from runtime.intake import prepare
from runtime.llama import LoadOptions
from runtime.served_names import Wanted
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
    monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    llama, given = FakeLlama(), list[LoadOptions]()

    def load(_: Path, options: LoadOptions) -> FakeLlama:
        given.append(options)
        return llama

    adapter = StoredModel("mail", Path(), MAIL, Path("mail.gguf"))
    wanted = Wanted("toy:mail", StoredModel("toy", Path(), BASE, Path("toy.gguf")), adapter, template)
    monkeypatch.setattr(served, "load", load)
    monkeypatch.setattr(served, "find", lambda *_: wanted)
    model = served.open_model("toy:mail", RuntimeConfig())
    assert given[0].adapters == {"mail": Path("mail.gguf")}
    assert (model.name, model.adapter, model.manifest, model.quantization) == ("toy:mail", "mail", MAIL, "Q8_0")
    assert model.fingerprint == f"deskside-{'a' * 12}-{'b' * 12}-fake"
    rendered = model.prompter.render([{"role": "user", "content": "hi"}])
    assert rendered == ("hi!" if template else "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n")
    call = prepare("chat", {"messages": [{"role": "user", "content": "hi"}], "n": 2, "model": "toy:mail"}, model)
    assert [request.adapter for request in call.requests] == ["mail", "mail"]
    model.worker.stop()
