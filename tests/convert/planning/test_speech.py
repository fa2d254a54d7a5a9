"""A fine-tune speaks with its own tokenizer: tokens and template of the adapter's folder, proved, on every route."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from convert.errors import AdapterInvalid, VerifyFailed
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from models.store.store import Store
from runtime.llama.model import load_tokenizer
from runtime.prompt.prompter import Prompter
from tests.support.convert.hf_tiny import weights, write_folder
from tests.support.convert.tiny import grid, write_adapter
from tests.support.convert.tiny_tokenizers import LLAMA3, QWEN2, byte_level, save

from ..test_pipeline import Notes

N_TOKENS = 704
N_ROWS = 720
TURN, STOP = N_TOKENS, N_TOKENS + 1
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 with more rows than tokens, as they are published."""
    folder = save(byte_level(QWEN2), tmp_path_factory.mktemp("hf") / "qwen", eos_token="<|im_end|>")
    arrays = weights("qwen2") | {"model.embed_tokens.weight": grid((N_ROWS, 64), 1, span=500, unit=1000)}
    return write_folder(folder, "qwen2", arrays, vocab_size=N_ROWS, eos_token_id=703)


@pytest.fixture(scope="module")
def base_gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("store"))
    return convert(ConvertRequest(source=str(base), name="base", quantization="F16"), store, Notes()).gguf


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def adapter(folder: Path, tokenizer: Tokenizer, eos: str) -> Path:
    """An adapter's folder as trainers save it, with the tokenizer beside it."""
    write_adapter(folder)
    return save(tokenizer, folder, eos_token=eos)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """An adapter that was trained with two tokens of its own."""
    tokenizer = byte_level(QWEN2)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<|turn|>", "<|stop|>")]
    )
    folder = adapter(tmp_path / "adapter", tokenizer, "<|stop|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_the_adapters_own_tokens_are_in_the_merged_model(
    store: Store, base: Path, base_gguf: Path, tuned: Path, form: str
) -> None:
    source, notes = {"folder": base, "gguf": base_gguf}[form], Notes()
    stored = convert(ConvertRequest(source=str(source), adapter=tuned, name="mine"), store, notes)
    tokenizer = load_tokenizer(stored.gguf)
    prompt = Prompter(tokenizer, TEMPLATE, 512).chat([{"role": "user", "content": "Hello"}])
    assert (prompt[0], prompt.count(TURN), prompt.count(STOP)) == (TURN, 2, 1)
    assert tokenizer.is_end(STOP)
    assert any(note.startswith("chat template: ") for note in notes.notes), "proved on the adapter's own template"
    assert any("2 tokens are the adapter's own" in warning and "'<|turn|>'" in warning for warning in notes.warnings)


def test_the_proof_is_of_the_adapters_folder(store: Store, base: Path, tuned: Path) -> None:
    """What Hugging Face reads there, and llama.cpp reads otherwise, is found."""
    raw = json.loads((tuned / "tokenizer.json").read_text())
    raw["added_tokens"][-1]["normalized"] = True
    raw["added_tokens"][-1]["single_word"] = True  # no token inside a word: llama.cpp has no such rule
    (tuned / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(VerifyFailed, match="the vocabulary is not the checkpoint's"):
        convert(ConvertRequest(source=str(base), adapter=tuned, name="mine"), store, Notes())


def test_a_template_alone_is_proved_with_the_bases_tokenizer(store: Store, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("turn", "im_start").replace("stop", "im_end"))
    notes = Notes()
    convert(ConvertRequest(source=str(base), adapter=folder, name="mine"), store, notes)
    assert any(note.startswith("chat template: ") for note in notes.notes)


def test_a_hot_adapter_cannot_have_tokens_that_its_base_lacks(store: Store, base_gguf: Path, tuned: Path) -> None:
    request = ConvertRequest(source=str(base_gguf), adapter=tuned, name="mine", hot=True)
    with pytest.raises(AdapterInvalid, match=r"has 2 tokens that the base lacks \('<\|turn\|>', .*leave out --hot"):
        convert(request, store, Notes())


def test_a_hot_adapter_is_proved_on_the_bases_tokens(store: Store, base: Path, base_gguf: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", byte_level(QWEN2), "<|im_end|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("turn", "im_start").replace("stop", "im_end"))
    notes = Notes()
    stored = convert(ConvertRequest(source=str(base_gguf), adapter=folder, name="mine", hot=True), store, notes)
    assert [note.partition(":")[0] for note in notes.notes] == ["tokenizer", "chat template"]
    assert "work" not in {path.name for path in stored.folder.iterdir()}


def test_a_hot_adapter_with_another_end_is_refused(store: Store, base_gguf: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", byte_level(QWEN2), "<|im_start|>")
    with pytest.raises(VerifyFailed, match="token 702 ends a turn of this adapter, but not of the base"):
        convert(ConvertRequest(source=str(base_gguf), adapter=folder, name="mine", hot=True), store, Notes())


@pytest.mark.parametrize("hot", [False, True])
def test_the_tokenizer_of_another_model_is_refused(store: Store, base_gguf: Path, tmp_path: Path, hot: bool) -> None:
    folder = adapter(tmp_path / "adapter", byte_level(LLAMA3, size=690), "<|im_end|>")
    with pytest.raises(AdapterInvalid, match=r"is another model's: \d+ ordinary tokens differ from those of the base"):
        convert(ConvertRequest(source=str(base_gguf), adapter=folder, name="mine", hot=hot), store, Notes())


def test_a_tokenizer_that_is_the_bases_changes_nothing(store: Store, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    plain = convert(ConvertRequest(source=str(base), adapter=folder, name="mine"), store, Notes()).gguf.read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, folder / name)
    notes = Notes()
    request = ConvertRequest(source=str(base), adapter=folder, name="mine", replace=True)
    assert convert(request, store, notes).gguf.read_bytes() == plain
    assert not [warning for warning in notes.warnings if "adapter's own" in warning]
