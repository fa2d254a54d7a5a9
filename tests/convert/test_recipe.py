"""Recipes of the catalogue: what they bring along, how they cut their vocabulary, and when a model is rebuilt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.cli import build_recipe
from convert.errors import AdapterInvalid, ConvertError, ImatrixInvalid, RequestInvalid
from convert.lora.adapter import read_adapter
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.quantize.imatrix import IMATRIX_FILE, Imatrix, ImatrixEntry, write_imatrix
from convert.tokenizer import chat_template
from models.common.files import sha256_file
from models.errors import BadExamples, BadManifest, HashMismatch, ModelError
from models.gguf.header import read_header, read_meta
from models.manifest import MANIFEST_FILE, Conversion, Manifest, dump_manifest, read_manifest
from models.store.catalog import CatalogEntry, load_catalog
from models.store.store import Store
from tests.support.convert.tiny import N_LAYERS, SHAPES, TOKENS, write_adapter, write_model

from .test_pipeline import Notes

# of the tiny model's tokens only "H" is in no text of EXAMPLES and in no turn of the chat template
KEEP = len(TOKENS) - 1
EXAMPLES = [{"messages": [{"role": "user", "content": "ol"}, {"role": "assistant", "content": "a"}]}]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def recipe(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe folder in the place of email-triage's, on a base that is installed."""
    convert(
        ConvertRequest(source=str(write_model(tmp_path / "b.gguf")), name="tiny-base", quantization="F16"),
        store,
        Notes(),
    )
    folder = tmp_path / "recipe"
    write_adapter(folder / "adapter")
    manifest = {
        "name": "email-triage",
        "licence": "L",
        "task": "classify",
        "labels": ["a", "b"],
        "base": {"name": "tiny-base", "sha256": sha256_file(store.get("tiny-base").gguf)},
        "adapter": {"path": "adapter", "sha256": read_adapter(folder / "adapter").sha256},
        "quality": [
            {"what": "as served", "split": "test", "correct": 1, "total": 2, "interval_low": 0.1, "interval_high": 0.9}
        ],
    }
    (folder / MANIFEST_FILE).write_text(dump_manifest(Manifest.model_validate(manifest)))
    monkeypatch.setattr(CatalogEntry, "recipe_folder", lambda entry: folder)
    return folder


def test_a_recipe_brings_everything_along(store: Store, recipe: Path) -> None:
    stored = convert(ConvertRequest(source="email-triage"), store, Notes())
    assert stored.name == "email-triage"
    assert stored.manifest is not None
    assert stored.manifest.labels == ("a", "b")
    assert stored.manifest.quality[0].what == "as served"
    assert "| as served | test | 1 of 2 | 0.500 |" in (stored.folder / "README.md").read_text()


def test_a_recipes_figures_are_not_claimed_for_another_quantization(store: Store, recipe: Path) -> None:
    stored = convert(ConvertRequest(source="email-triage", name="triage-f16", quantization="F16"), store, Notes())
    assert stored.manifest is not None
    assert (stored.name, stored.manifest.quality, stored.manifest.labels) == ("triage-f16", (), ("a", "b"))


def test_a_recipe_is_not_built_on_another_base(store: Store, recipe: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "o.gguf", changes={"output_norm.weight": np.full(64, 2, np.float32)})
    convert(ConvertRequest(source=str(other), name="tiny-base", quantization="F16", replace=True), store, Notes())
    with pytest.raises(HashMismatch, match="the recipe was made on"):
        convert(ConvertRequest(source="email-triage"), store, Notes())
    assert store.names() == ["tiny-base"]


def test_a_recipe_whose_adapter_was_changed_is_refused(store: Store, recipe: Path) -> None:
    manifest = read_manifest(recipe)
    assert manifest.adapter is not None
    changed = manifest.adapter.model_copy(update={"sha256": "0" * 64})
    (recipe / MANIFEST_FILE).write_text(dump_manifest(manifest.model_copy(update={"adapter": changed})))
    with pytest.raises(AdapterInvalid, match="the recipe expects 0000"):
        convert(ConvertRequest(source="email-triage"), store, Notes())


def test_a_damaged_base_in_the_store_is_noticed(store: Store, recipe: Path) -> None:
    gguf_file = store.get("tiny-base").gguf
    data = bytearray(gguf_file.read_bytes())
    data[-1] ^= 1
    gguf_file.write_bytes(data)
    with pytest.raises(HashMismatch, match=r"its model\.toml says"):
        convert(ConvertRequest(source="email-triage"), store, Notes())


def trimming(recipe: Path, trim: str = "data/train.jsonl", keep: int = KEEP, quantization: str = "F16") -> None:
    """Let the recipe cut its vocabulary."""
    (recipe / "data").mkdir(exist_ok=True)
    (recipe / "data" / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    conversion = f'[conversion]\nquantization = "{quantization}"\ntrim = {json.dumps(trim)}\nkeep = {keep}\n'
    text = dump_manifest(read_manifest(recipe).model_copy(update={"conversion": None}))
    (recipe / MANIFEST_FILE).write_text(text + "\n" + conversion)


def test_a_recipe_cuts_its_vocabulary_by_its_own_examples(store: Store, recipe: Path) -> None:
    trimming(recipe)
    stored = convert(ConvertRequest(source="email-triage"), store, Notes())
    meta = read_meta(stored.gguf)
    assert meta.n_vocab == KEEP
    # "H" stood before none of the special tokens, so these keep their numbers
    assert meta.number("tokenizer.ggml.eot_token_id") == TOKENS.index(b"<end_of_turn>")
    assert stored.manifest is not None
    assert stored.manifest.conversion == Conversion(quantization="F16", trim="data/train.jsonl", keep=KEEP)
    assert stored.manifest.quality[0].what == "as served"


def test_options_of_trimming_keep_the_recipes_rounding(store: Store, recipe: Path) -> None:
    trimming(recipe, quantization="Q4_0")
    write_imatrix(recipe / "i.gguf", steep())
    with (recipe / MANIFEST_FILE).open("a") as manifest:
        manifest.write('imatrix = "i.gguf"\n')
    for options in ({"whole_vocabulary": True}, {"trim": recipe / "data" / "train.jsonl", "keep": KEEP}):
        request = ConvertRequest(source="email-triage", name="other", replace=True).model_copy(update=options)
        stored = convert(request, store, Notes())
        assert stored.manifest is not None
        assert stored.manifest.artefacts[0].quantization == "Q4_0"
        assert stored.manifest.conversion is not None
        assert stored.manifest.conversion.imatrix == IMATRIX_FILE
        assert (stored.folder / IMATRIX_FILE).read_bytes() == (recipe / "i.gguf").read_bytes()


def steep(layers: int = N_LAYERS) -> Imatrix:
    """An importance matrix in which the first columns matter most."""
    columns = {f"blk.{n}.{name}.weight": shape[1] for n in range(layers) for name, shape in SHAPES.items()}
    entries = {
        name: ImatrixEntry(np.logspace(6, -6, n, dtype=np.float32)[None], np.ones(1)) for name, n in columns.items()
    }
    return Imatrix(entries, 1, 1)


def weights_of(path: Path) -> bytes:
    """Everything but the head, which has the model's name."""
    return path.read_bytes()[min(tensor.offset for tensor in read_header(path).tensors.values()) :]


def test_a_recipe_rounds_by_its_importance_matrix(store: Store, recipe: Path) -> None:
    conversions = {"plain": Conversion(quantization="Q4_0"), "steep": Conversion(quantization="Q4_0", imatrix="i.gguf")}
    write_imatrix(recipe / "i.gguf", steep())
    made = {}
    for name, conversion in conversions.items():
        changed = read_manifest(recipe).model_copy(update={"conversion": conversion})
        (recipe / MANIFEST_FILE).write_text(dump_manifest(changed))
        stored = convert(ConvertRequest(source="email-triage", name=name), store, Notes())
        assert stored.manifest is not None
        assert stored.manifest.conversion == conversion
        made[name] = weights_of(stored.gguf)
    # asked for otherwise it is what it would be without the recipe
    asked = convert(ConvertRequest(source="email-triage", name="asked", quantization="Q4_0"), store, Notes())
    assert made["plain"] == weights_of(asked.gguf) != made["steep"]


UNFIT: dict[str, tuple[str, type[Exception], str]] = {
    "no such file": ("none.gguf", ImatrixInvalid, r"no importance matrix: .*none\.gguf"),
    "another model's": ("deep.gguf", ImatrixInvalid, "collected on another model"),
    "above its folder": ("../i.gguf", BadManifest, r"conversion\.imatrix must be a path inside the recipe's folder"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_importance_matrix_that_does_not_fit_is_refused(store: Store, recipe: Path, case: str) -> None:
    name, kind, message = UNFIT[case]
    write_imatrix(recipe / "deep.gguf", steep(N_LAYERS + 1))
    text = dump_manifest(read_manifest(recipe).model_copy(update={"conversion": None}))
    (recipe / MANIFEST_FILE).write_text(f'{text}\n[conversion]\nquantization = "Q4_0"\nimatrix = "{name}"\n')
    with pytest.raises(kind, match=message):
        convert(ConvertRequest(source="email-triage"), store, Notes())
    assert store.names() == ["tiny-base"]


CHANGED: dict[str, tuple[dict[str, Any], int]] = {
    "another quantization": ({"quantization": "Q8_0"}, KEEP),
    "another adapter": ({"adapter": "adapter"}, len(TOKENS)),
    "the whole vocabulary": ({"whole_vocabulary": True}, len(TOKENS)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_options_that_change_the_model_drop_only_what_no_longer_holds(store: Store, recipe: Path, case: str) -> None:
    trimming(recipe)
    changes, n_vocab = CHANGED[case]
    if "adapter" in changes:
        changes = {"adapter": recipe / "adapter"}
    stored = convert(ConvertRequest(source="email-triage", name="other").model_copy(update=changes), store, Notes())
    assert read_meta(stored.gguf).n_vocab == n_vocab
    assert stored.manifest is not None
    assert stored.manifest.quality == (), "the recipe's figures were not measured on it"
    assert stored.manifest.conversion is not None
    assert (stored.manifest.conversion.trim, stored.manifest.conversion.keep) == ("", KEEP if n_vocab == KEEP else 0)


def test_a_hot_adapter_of_a_recipe_that_cuts_leaves_the_base_whole(store: Store, recipe: Path) -> None:
    trimming(recipe)
    made = convert(ConvertRequest(source="email-triage", name="hot", hot=True), store, Notes()).manifest
    assert made is not None
    assert (made.kind, made.conversion) == ("adapter", None)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such file": ({"trim": "data/none.jsonl"}, BadExamples, r"none\.jsonl.*cannot be read"),
    "a folder": ({"trim": "data"}, BadExamples, "are a folder"),
    "above its folder": ({"trim": "../train.jsonl"}, BadManifest, r"inside the recipe's folder, .*'\.\./train"),
    "absolute": ({"trim": "/etc/passwd"}, BadManifest, "inside the recipe's folder, .*'/etc/passwd'"),
    "backslashes": ({"trim": "..\\train.jsonl"}, BadManifest, "inside the recipe's folder"),
    "no size": ({"keep": 0}, BadManifest, r"needs conversion\.keep"),
    "too small": ({"keep": 100}, RequestInvalid, r"100 tokens are to be kept, but \d+ are needed"),
    "unknown quantization": ({"quantization": "Q9"}, ConvertError, "unknown quantization 'Q9'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_that_cannot_be_cut_as_it_says_is_refused(store: Store, recipe: Path, case: str) -> None:
    changes, kind, message = REFUSED[case]
    trimming(recipe, **changes)
    with pytest.raises(kind, match=message) as refused:
        convert(ConvertRequest(source="email-triage"), store, Notes())
    assert isinstance(refused.value, ConvertError | ModelError)
    assert store.names() == ["tiny-base"]


def test_cutting_and_leaving_whole_at_once_is_refused(store: Store, recipe: Path) -> None:
    trimming(recipe)
    request = ConvertRequest(source="email-triage", whole_vocabulary=True, trim=recipe / "data" / "train.jsonl")
    with pytest.raises(RequestInvalid, match=r"--whole-vocab and --trim-vocab .* exclude each other"):
        convert(request, store, Notes())


def test_a_given_manifest_says_nothing_about_how_another_model_was_converted(store: Store, recipe: Path) -> None:
    trimming(recipe)
    request = ConvertRequest(source="tiny-base", name="mine", manifest=recipe / MANIFEST_FILE)
    made = convert(request, store, Notes()).manifest
    assert made is not None
    assert made.conversion == Conversion(quantization="Q8_0")


def test_a_build_of_an_older_recipe_is_rebuilt_once(
    store: Store, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = load_catalog().get("email-triage")
    build_recipe(entry, store)
    trimming(recipe)
    capsys.readouterr()
    assert read_meta(build_recipe(entry, store).gguf).n_vocab == KEEP
    assert "'email-triage' was built by an older recipe; rebuilding" in capsys.readouterr().err
    build_recipe(entry, store)
    assert capsys.readouterr().err == ""


def test_a_build_with_an_older_chat_template_is_rebuilt_once(
    store: Store, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trimming(recipe)
    earlier = recipe / "adapter" / "chat_template.jinja"
    earlier.write_text("<start_of_turn>{{ messages }}<end_of_turn>")
    entry = load_catalog().get("email-triage")
    assert read_meta(build_recipe(entry, store).gguf).text(chat_template.TEMPLATE_FIELD) == earlier.read_text()
    earlier.unlink()
    capsys.readouterr()
    template = read_meta(build_recipe(entry, store).gguf).text(chat_template.TEMPLATE_FIELD)
    assert template == chat_template.gemma_turns()
    assert "'email-triage' was built by an older recipe; rebuilding" in capsys.readouterr().err
    build_recipe(entry, store)
    assert capsys.readouterr().err == ""


def test_a_build_with_its_adapters_own_template_is_kept(
    store: Store, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trimming(recipe)
    (recipe / "adapter" / "chat_template.jinja").write_text("<start_of_turn>{{ messages }}<end_of_turn>")
    entry = load_catalog().get("email-triage")
    build_recipe(entry, store)
    capsys.readouterr()
    build_recipe(entry, store)
    assert capsys.readouterr().err == ""


def test_a_build_with_other_settings_is_not_replaced(
    store: Store, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(ConvertRequest(source="email-triage", quantization="Q8_0"), store, Notes())
    trimming(recipe)
    assert read_meta(build_recipe(load_catalog().get("email-triage"), store).gguf).n_vocab == len(TOKENS)
    assert capsys.readouterr().err == ""
