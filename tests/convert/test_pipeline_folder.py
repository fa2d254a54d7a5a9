"""A Hugging Face folder all the way to an installed model: proof, examples, trimming, and what is refused."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from convert.cli import summary
from convert.errors import ArchitectureUnknown, RequestInvalid, VerifyFailed
from convert.measure.speed import measure_speeds
from convert.pipeline import MEASUREMENTS, convert
from convert.planning.request import ConvertRequest
from convert.quantize.imatrix import IMATRIX_FILE
from convert.quantize.quantize import quantize, spec_named
from convert.selection.ladder import Tools
from models.common.files import sha256_file
from models.errors import BadExamples, StoreError
from models.gguf.header import read_header
from models.manifest import Prompt
from models.quality import read_quality
from models.store.store import Store
from runtime.llama.model import load_tokenizer
from tests.support.convert.hf_tiny import weights, write_folder
from tests.support.convert.tiny import grid, write_mails
from tests.support.convert.tiny_tokenizers import QWEN2, byte_level, edit, save, sentence_bpe

from .test_pipeline import Notes, files_under

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
N_TOKENS = 704


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 704 tokens with its tokenizer."""
    folder = save(byte_level(QWEN2), tmp_path_factory.mktemp("hf") / "qwen", eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == N_TOKENS
    arrays = weights("qwen2") | {"model.embed_tokens.weight": grid((N_TOKENS, 64), 1, span=500, unit=1000)}
    return write_folder(folder, "qwen2", arrays, vocab_size=N_TOKENS, eos_token_id=703)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty mails of two kinds."""
    return write_mails(tmp_path_factory.mktemp("examples") / "mails.jsonl")


@pytest.fixture(scope="module", autouse=True)
def hasty() -> Iterator[None]:
    """Speeds are measured, but not well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "convert.selection.ladder.Tools",
            partial(Tools, speeds=partial(measure_speeds, rounds=1, seconds=0.01), busy=lambda: 0.0),
        )
        yield


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@dataclasses.dataclass(frozen=True)
class Run:
    """A conversion by examples, all of whose candidates were measured."""

    store: Store
    notes: Notes


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, examples: Path) -> Run:
    """The checkpoint as `mine`, chosen by the examples in a new store."""
    run = Run(Store(tmp_path_factory.mktemp("first") / "home"), Notes())
    convert(ConvertRequest(source=str(checkpoint), name="mine", examples=examples), run.store, run.notes)
    return run


@pytest.fixture
def measured(store: Store, first_run: Run) -> Store:
    """A store without models that holds what the first run has measured, for conversions called `mine`."""
    shutil.copytree(first_run.store.home / MEASUREMENTS, store.home / MEASUREMENTS)
    return store


def test_a_folder_is_proved_converted_and_installed(store: Store, checkpoint: Path) -> None:
    notes = Notes()
    stored = convert(ConvertRequest(source=str(checkpoint), name="tiny"), store, notes)
    store.verify("tiny")
    assert stored.manifest is not None
    assert stored.manifest.base is not None
    assert stored.manifest.base.name == "qwen"
    assert stored.manifest.conversion is not None
    assert stored.manifest.conversion.quantization == "Q8_0"
    assert any("same" in note and "tokens as in Hugging Face's" in note for note in notes.notes)
    assert any(note.startswith("chat template:") for note in notes.notes)
    assert read_header(stored.gguf).text("tokenizer.chat_template") == TEMPLATE
    assert "work" not in {path.name for path in stored.folder.iterdir()}


def test_a_changed_weight_gives_another_base(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "qwen"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())

    def base(folder: Path, name: str) -> str:
        manifest = convert(ConvertRequest(source=str(folder), name=name), store, Notes()).manifest
        assert manifest is not None
        assert manifest.base is not None
        return manifest.base.sha256

    first, again = base(checkpoint, "one"), base(copy, "two")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert first == again != base(copy, "three")


def test_a_tokenizer_that_reads_otherwise_is_found_before_anything_is_installed(
    store: Store, checkpoint: Path, tmp_path: Path
) -> None:
    """Weights made elsewhere, from a checkpoint with another tokenizer."""
    made = convert(ConvertRequest(source=str(checkpoint), name="made", quantization="F16"), store, Notes()).gguf
    other = save(byte_level(QWEN2, size=600), tmp_path / "other", eos_token="<|im_end|>")
    before = files_under(store)
    with pytest.raises(VerifyFailed, match="the vocabulary is not the checkpoint's"):
        convert(ConvertRequest(source=str(other), name="mixed", gguf=made), store, Notes())
    assert files_under(store) == before
    notes = Notes()
    convert(ConvertRequest(source=str(checkpoint), name="mended", gguf=made), store, notes)
    assert any("tokens as in Hugging Face's" in note for note in notes.notes)


def test_phi_3s_tokens_swallow_white_space_under_any_name(store: Store, tmp_path: Path) -> None:
    """llama.cpp knows them by `general.name` only; a vocabulary of another kind must not be taken for theirs."""
    plain = save(sentence_bpe(), tmp_path / "plain")
    stripping = save(sentence_bpe(), tmp_path / "stripping")
    for folder in (plain, stripping):
        tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        tokens.append({**tokens[-1], "id": tokens[-1]["id"] + 1, "content": "<|endoftext|>"})
        for token in tokens if folder == stripping else ():
            token["rstrip"] = token["content"] not in {"<unk>", "<s>", "<|endoftext|>"}
        edit(folder, {"added_tokens": tokens})
        n_tokens = tokens[-1]["id"] + 1
        arrays = weights("qwen2") | {"model.embed_tokens.weight": grid((n_tokens, 64), 1, span=500, unit=1000)}
        write_folder(folder, "qwen2", arrays, vocab_size=n_tokens, eos_token_id=1)

    def strips(source: Path, name: str) -> bool:
        tokenizer = load_tokenizer(convert(ConvertRequest(source=str(source), name=name), store, Notes()).gguf)
        spaced, bare = (tokenizer.encode(f"<|im_end|>{gap}a", add_special=False, parse_special=True) for gap in "\n ")
        return spaced == bare

    assert strips(stripping, "mails")
    assert strips(store.get("mails").gguf, "letters")
    assert not strips(plain, "phi3-letters")


def test_the_examples_choose_and_the_card_says_how(measured: Store, checkpoint: Path, examples: Path) -> None:
    notes = Notes()
    stored = convert(
        ConvertRequest(source=str(checkpoint), name="mine", examples=examples, max_loss=0.5), measured, notes
    )
    quality = read_quality(stored.folder)
    assert stored.manifest is not None
    assert quality.work == "classify"
    assert (stored.manifest.task, stored.manifest.labels) == ("classify", ("ham", "spam"))
    assert stored.manifest.prompt == Prompt(template="Mail {text}")
    assert quality.chosen == stored.manifest.artefacts[0].quantization
    assert quality.budget.kl_mean == 0.5
    assert (quality.calibration_examples, quality.held_out_examples) == (20, 20)
    assert {"F16", "Q8_0", "Q4_0"} <= {one.name for one in quality.candidates}
    assert sum(one.verdict == "chosen" for one in quality.candidates) == 1
    assert quality.noise is not None
    card = (stored.folder / "README.md").read_text()
    assert quality.chosen in card
    assert any("20 examples are held out" in note and "lets none of them change" in note for note in notes.notes)
    said = summary(stored)
    assert said[0].startswith(f"installed mine: {quality.chosen}, ")
    assert any("answers differ from F16's" in line for line in said)
    assert said[-1] == "next: deskside serve mine"
    assert "noise floor" in card
    by_imatrix = next(one.imatrix for one in quality.candidates if one.name == quality.chosen)
    names = {path.name for path in stored.folder.iterdir()} - ({IMATRIX_FILE} if by_imatrix else set())
    assert names == {"README.md", "model.toml", "quality.json", "quality.svg", "calibration.svg", stored.gguf.name}


def test_what_a_file_was_rounded_by_is_kept_with_it(measured: Store, checkpoint: Path, examples: Path) -> None:
    request = ConvertRequest(source=str(checkpoint), name="mine", quantization="Q4_0", examples=examples, keep_f16=True)
    stored = convert(request, measured, Notes())
    assert stored.manifest is not None
    assert stored.manifest.conversion is not None
    assert stored.manifest.conversion.imatrix == IMATRIX_FILE
    half, again = stored.folder / stored.manifest.artefacts[1].file, stored.folder / "again.gguf"
    spec = spec_named("Q4_0", imatrix=True)
    quantize(half, again, spec, stored.folder / IMATRIX_FILE, lambda done, total: None)
    assert sha256_file(again) == stored.manifest.artefacts[0].sha256


def test_what_needs_no_importance_matrix_is_kept_without(measured: Store, checkpoint: Path, examples: Path) -> None:
    stored = convert(
        ConvertRequest(source=str(checkpoint), name="mine", quantization="Q8_0", examples=examples), measured, Notes()
    )
    assert stored.manifest is not None
    assert stored.manifest.conversion is not None
    assert stored.manifest.conversion.imatrix == ""
    assert not (stored.folder / IMATRIX_FILE).exists()


def test_a_second_run_measures_nothing_again(measured: Store, first_run: Run, checkpoint: Path, examples: Path) -> None:
    again = Notes()
    kept = {path.name for path in (first_run.store.home / MEASUREMENTS).iterdir()}
    stored = convert(ConvertRequest(source=str(checkpoint), name="mine", examples=examples), measured, again)
    assert {path.name for path in (measured.home / MEASUREMENTS).iterdir()} == kept
    busy = ("collect", "measure", "take", "time")
    assert [stage for stage in first_run.notes.stages if stage.startswith(busy)]
    assert [stage for stage in again.stages if stage.startswith(busy)] == []
    measured.verify(stored.name)


def test_quant_overrules_the_examples_and_the_card_says_so(measured: Store, checkpoint: Path, examples: Path) -> None:
    request = ConvertRequest(source=str(checkpoint), name="mine", quantization="q5_0", examples=examples)
    stored = convert(request, measured, Notes())
    quality = read_quality(stored.folder)
    assert (quality.chosen, quality.overruled) == ("Q5_0", True)
    assert "overruled" in (stored.folder / "README.md").read_text()


def test_a_vocabulary_is_trimmed_and_the_report_says_what_it_covers(
    store: Store, checkpoint: Path, examples: Path
) -> None:
    request = ConvertRequest(source=str(checkpoint), name="small", examples=examples, trim=examples, keep=512)
    stored = convert(request, store, Notes())
    header = read_header(stored.gguf)
    assert header.tensors["token_embd.weight"].shape[0] == 512
    trim = read_quality(stored.folder).trim
    assert trim is not None
    assert (trim.tokens_before, trim.tokens_after) == (N_TOKENS, 512)
    assert trim.covered_examples == trim.covered_tokens == 1.0
    assert trim.greedy_agreement is not None  # of weights that mean nothing it may be anything
    assert stored.manifest is not None
    assert stored.manifest.conversion is not None
    assert stored.manifest.conversion.keep == 512


@pytest.mark.parametrize("stage", ["write F16", "collect", "measure", "time", "quantize"])
def test_an_interrupt_leaves_no_model_and_no_file(store: Store, checkpoint: Path, examples: Path, stage: str) -> None:
    require_nothing_left(store, checkpoint, examples, stage)


def test_an_interrupt_at_the_end_leaves_no_model_and_no_file(measured: Store, checkpoint: Path, examples: Path) -> None:
    require_nothing_left(measured, checkpoint, examples, "verify")


def require_nothing_left(store: Store, checkpoint: Path, examples: Path, stage: str) -> None:
    """Interrupt a conversion when `stage` begins: the store holds nothing afterwards but what was measured."""
    notes = Notes(stage, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(ConvertRequest(source=str(checkpoint), name="mine", examples=examples), store, notes)
    left = [path for path in files_under(store) if not path.startswith(f"{MEASUREMENTS}/")]
    assert left == []
    assert not [path for path in files_under(store) if path.endswith(".gguf") and "imatrix" not in path]


def test_a_disk_that_is_too_small_is_found_first(
    store: Store, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("models.common.files.shutil.disk_usage", lambda _: usage)
    notes = Notes()
    with pytest.raises(StoreError, match="bytes are needed"):
        convert(ConvertRequest(source=str(checkpoint), name="tiny"), store, notes)
    assert not [stage for stage in notes.stages if stage.startswith("write")]
    assert files_under(store) == []


def test_a_disk_that_fills_up_while_writing_is_told_with_the_file(
    store: Store, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("convert.gguf_writer._write_tensor", full)
    with pytest.raises(StoreError, match=r"tiny-F16\.gguf' \(\d+ bytes\) cannot be written: No space left"):
        convert(ConvertRequest(source=str(checkpoint), name="tiny"), store, Notes())
    assert files_under(store) == []


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"keep": 100}, RequestInvalid, "--keep 100 needs --trim-vocab"),
        ({"max_loss": 0.1}, RequestInvalid, "--max-loss 0.1 needs --examples"),
        ({"work": "write"}, RequestInvalid, "--for write needs --examples"),
        ({"examples": Path("missing.jsonl")}, BadExamples, "missing.jsonl"),
        ({"gguf": Path("missing.gguf")}, RequestInvalid, "missing.gguf"),
        ({"max_loss": -1.0, "examples": Path("x")}, RequestInvalid, "got -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    store: Store, checkpoint: Path, wrong: dict[str, object], kind: type[Exception], says: str
) -> None:
    request = ConvertRequest(source=str(checkpoint), name="tiny").model_copy(update=wrong)
    with pytest.raises(kind, match=says):
        convert(request, store, Notes())
    assert files_under(store) == []


def test_an_unknown_family_is_refused_with_the_way_out(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "strange"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ArchitectureUnknown, match=r"GPT2LMHeadModel.*--gguf"):
        convert(ConvertRequest(source=str(folder), name="tiny"), store, Notes())


def test_few_examples_are_refused_before_the_weights_are_read(
    store: Store, checkpoint: Path, examples: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(examples.read_text().splitlines(keepends=True)[:8]))
    notes = Notes()
    with pytest.raises(BadExamples, match="the examples hold 8 different prompts in 8 records; at least 20 are needed"):
        convert(ConvertRequest(source=str(checkpoint), name="tiny", examples=few), store, notes)
    assert not [stage for stage in notes.stages if stage.startswith("write")]
