"""Labels that were added as special tokens are answers: shown, chosen and measured as one token each."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from convert.errors import AdapterInvalid
from convert.measure.tasks import tasks_of
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from models.common.chat_records import read_chat_records
from models.store.store import Store
from runtime.llama.model import load_tokenizer
from tests.support.convert.hf_tiny import weights, write_folder
from tests.support.convert.tiny import grid, write_adapter
from tests.support.convert.tiny_tokenizers import QWEN2, byte_level, save

from ..test_pipeline import Notes
from ..test_pipeline_folder import TEMPLATE

SPAM, HAM, MARK, N_TOKENS = 704, 705, 706, 707


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 whose labels, and a mark in its prompts, are special tokens."""
    tokenizer = byte_level(QWEN2)
    added = [AddedToken(text, special=True, normalized=False) for text in ("<spam>", "<ham>", "[mail]")]
    tokenizer.add_special_tokens(added)
    folder = save(tokenizer, tmp_path_factory.mktemp("hf") / "qwen", eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    arrays = weights("qwen2") | {"model.embed_tokens.weight": grid((N_TOKENS, 64), 1, span=500, unit=1000)}
    return write_folder(folder, "qwen2", arrays, vocab_size=N_TOKENS, eos_token_id=703)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def examples(folder: Path) -> Path:
    file = folder / "mails.jsonl"
    chats = [
        [{"role": "user", "content": f"[mail] Win {n}"}, {"role": "assistant", "content": ("<ham>", "<spam>")[n % 2]}]
        for n in range(24)
    ]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def manifest(folder: Path, *labels: str) -> Path:
    file = folder / "model.toml"
    file.write_text(f'name = "x"\nlicence = "none"\ntask = "classify"\nlabels = {json.dumps(labels)}\n')
    return file


def test_labels_of_the_manifest_are_shown_and_read(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    notes = Notes()
    request = ConvertRequest(source=str(checkpoint), name="mine", manifest=manifest(tmp_path, "<spam>", "<ham>"))
    tokenizer = load_tokenizer(convert(request, store, notes).gguf)
    assert tokenizer.decode([SPAM, HAM]) == "<spam><ham>"
    assert tokenizer.encode("<spam>", add_special=False, parse_special=False) == [SPAM]
    assert tokenizer.token_bytes(MARK) == b"", "what nothing is made of stays as it was"
    assert any("2 special tokens are read and shown like text" in warning for warning in notes.warnings)


def test_special_tokens_in_examples_are_measured_as_what_they_are(
    store: Store, checkpoint: Path, tmp_path: Path
) -> None:
    """The recipe's route to a cut vocabulary reads the examples as the ladder does."""
    file, notes = examples(tmp_path), Notes()
    stored = convert(ConvertRequest(source=str(checkpoint), name="mine", trim=file, keep=600), store, notes)
    tokenizer = load_tokenizer(stored.gguf)
    tasks = tasks_of(stored.gguf, read_chat_records(file), "classify", ("<ham>", "<spam>"))
    assert [len(choice) for choice in tasks.choices] == [1, 1]
    assert tokenizer.decode(tasks.choices[0]) == "<ham>"
    assert len(tokenizer.encode("[mail]", add_special=False, parse_special=False)) == 1
    assert not any("are not compared" in warning for warning in notes.warnings)


def test_special_tokens_that_nothing_uses_are_told(store: Store, checkpoint: Path) -> None:
    notes = Notes()
    convert(ConvertRequest(source=str(checkpoint), name="mine"), store, notes)
    assert any(
        "3 special tokens at the end of the vocabulary are used by nothing ('<spam>', '<ham>', '[mail]')" in warning
        and "give --examples" in warning
        for warning in notes.warnings
    )


def test_a_hot_adapter_cannot_answer_in_special_tokens(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    base = convert(ConvertRequest(source=str(checkpoint), name="base", quantization="F16"), store, Notes()).gguf
    labels = manifest(tmp_path, "<spam>", "<ham>")
    adapter = write_adapter(tmp_path / "adapter")
    request = ConvertRequest(source=str(base), adapter=adapter, name="mine", hot=True, manifest=labels)
    with pytest.raises(AdapterInvalid, match=r"2 labels are special tokens of the base \('<spam>', '<ham>'\)"):
        convert(request, store, Notes())
