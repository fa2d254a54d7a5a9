"""Adapters of a tiny model applied by the real llama.cpp: the file's content, and the same answers as a merge."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.errors import AdapterInvalid, RequestInvalid, VerifyFailed
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from convert.proof.runs import verify_adapter
from models.common.files import sha256_file
from models.errors import StoreError
from models.manifest import MANIFEST_FILE, Base, Manifest, dump_manifest
from models.manifest import Adapter as AdapterRecord
from models.store.catalog import CatalogEntry
from models.store.store import Store
from runtime.llama.decode import last_logits
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load
from tests.convert.test_pipeline import Notes, files_under
from tests.support.convert.tiny import MODULES, N_LAYERS, adapter_tensors, write_adapter, write_mails, write_model

PREFIX = "base_model.model.model."
TEXT = [2, 263, 264, 265, 265, 266, 100, 50, 7, 200]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def hot_request(tmp_path: Path) -> ConvertRequest:
    base, adapter = write_model(tmp_path / "base.gguf"), write_adapter(tmp_path / "adapter")
    return ConvertRequest(source=str(base), name="tuned", adapter=adapter, hot=True)


def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    """After `TEXT`: of the model at `path`, with the adapter applied if there is one."""
    adapters = {"tuned": adapter} if adapter is not None else {}
    llama = load(path, LoadOptions(n_ctx=256, n_batch=64, n_seq_max=1, n_threads=1, gpu_layers=0, adapters=adapters))
    try:
        llama.use_adapter("tuned" if adapter is not None else None)
        return last_logits(llama, TEXT)
    finally:
        llama.close()


def test_the_file_holds_the_adapters_own_numbers(store: Store, hot_request: ConvertRequest) -> None:
    stored = convert(hot_request, store, Notes())
    reader = gguf.GGUFReader(stored.gguf)
    values = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert "<start_of_turn>model" in values.pop("tokenizer.chat_template")
    assert values == {
        "general.architecture": "gemma3",
        "general.type": "adapter",
        "general.name": "tuned",
        "general.license": "tiny-licence",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    given = adapter_tensors()
    assert len(tensors) == len(given) == 2 * N_LAYERS * len(MODULES)
    for layer in range(N_LAYERS):
        for name, module in MODULES.items():
            for part in "AB":
                wanted = given[f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"]
                np.testing.assert_array_equal(tensors[f"blk.{layer}.{name}.weight.lora_{part.lower()}"], wanted)


def test_task_and_labels_come_from_the_examples(store: Store, hot_request: ConvertRequest, tmp_path: Path) -> None:
    examples, notes = write_mails(tmp_path / "mails.jsonl"), Notes()
    manifest = convert(hot_request.model_copy(update={"examples": examples}), store, notes).manifest
    assert manifest is not None
    assert (manifest.task, manifest.labels) == ("classify", ("ham", "spam"))
    assert any("nothing is measured" in note for note in notes.notes)
    with pytest.raises(RequestInvalid, match="--max-loss"):
        convert(hot_request.model_copy(update={"examples": examples, "max_loss": 0.1}), store, Notes())


def test_it_is_installed_as_an_adapter_of_its_base(store: Store, hot_request: ConvertRequest) -> None:
    notes = Notes()
    stored = convert(hot_request, store, notes)
    assert files_under(store) == [f"models/tuned/{name}" for name in ("README.md", "model.toml", "tuned-F32.gguf")]
    store.verify("tuned")
    manifest = stored.manifest
    assert manifest is not None
    assert (manifest.kind, manifest.name, manifest.licence) == ("adapter", "tuned", "tiny-licence")
    assert manifest.base == Base(name="base", sha256=sha256_file(Path(hot_request.source)))
    assert hot_request.adapter is not None
    weights = hot_request.adapter / "adapter_model.safetensors"
    assert manifest.adapter == AdapterRecord(path="adapter", sha256=sha256_file(weights), rank=4)
    assert [artefact.quantization for artefact in manifest.artefacts] == ["F32"]
    assert [stage.split()[0] for stage in notes.stages] == ["check", "write", "verify"]
    assert notes.warnings == []
    first = stored.gguf.read_bytes()
    assert convert(hot_request.model_copy(update={"replace": True}), store, Notes()).gguf.read_bytes() == first


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"alpha_pattern": {"layers.1.mlp.up_proj": 24, "q_proj": 2}},
    "negative": {"lora_alpha": -8},
    "zero first": {"alpha_pattern": {"layers.0.mlp.down_proj": 0}},
}


@pytest.mark.parametrize("architecture", ["gemma3", "llama"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_applied_adapter_answers_as_a_merged_one(
    store: Store, tmp_path: Path, architecture: str, settings: dict[str, Any]
) -> None:
    base = write_model(tmp_path / "base.gguf", architecture, kind=gguf.GGMLQuantizationType.F16)
    adapter = write_adapter(tmp_path / "adapter", **settings)
    hot = convert(ConvertRequest(source=str(base), name="hot", adapter=adapter, hot=True), store, Notes())
    merged = convert(
        ConvertRequest(source=str(base), name="merged", adapter=adapter, quantization="F16"), store, Notes()
    )
    bare, wanted, found = logits(base), logits(merged.gguf), logits(base, hot.gguf)
    change = np.abs(wanted - bare).max()
    assert change > 0.05, "the adapter must matter for this to show anything"
    assert np.abs(found - wanted).max() < change / 20


def test_on_a_coarse_base_the_fine_tune_stays_where_merging_onto_the_grid_loses_it(
    store: Store, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q4_0)
    tensors = {name: array / 16 if "lora_B" in name else array for name, array in adapter_tensors().items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    hot = convert(ConvertRequest(source=str(base), name="hot", adapter=adapter, hot=True), store, Notes())
    full = convert(ConvertRequest(source=str(base), name="full", adapter=adapter, quantization="F16"), store, Notes())
    rounded = convert(
        ConvertRequest(source=str(base), name="rounded", adapter=adapter, quantization="Q4_0"), store, Notes()
    )
    wanted = logits(full.gguf)
    assert np.abs(logits(base, hot.gguf) - wanted).max() < np.abs(logits(rounded.gguf) - wanted).max() / 2


def test_the_adapters_own_template_goes_with_it(store: Store, hot_request: ConvertRequest) -> None:
    assert hot_request.adapter is not None
    (hot_request.adapter / "chat_template.jinja").write_text("mine {{ messages[0].content }}<end_of_turn>")
    fields = gguf.GGUFReader(convert(hot_request, store, Notes()).gguf).fields
    assert fields["tokenizer.chat_template"].contents().startswith("mine ")


def test_an_untrained_adapter_is_warned_about(store: Store, tmp_path: Path, hot_request: ConvertRequest) -> None:
    zero = write_adapter(tmp_path / "zero", {name: 0 * array for name, array in adapter_tensors().items()})
    notes = Notes()
    convert(hot_request.model_copy(update={"adapter": zero}), store, notes)
    assert "never trained" in notes.warnings[0]


def test_an_adapter_that_changes_no_logit_is_not_installed(
    store: Store, tmp_path: Path, hot_request: ConvertRequest
) -> None:
    faint = write_adapter(tmp_path / "faint", {name: array * 1e-18 for name, array in adapter_tensors().items()})
    with pytest.raises(VerifyFailed, match="those of the base alone"):
        convert(hot_request.model_copy(update={"adapter": faint}), store, Notes())
    assert files_under(store) == []


def test_an_adapter_whose_logits_are_not_finite_is_not_installed(
    store: Store, tmp_path: Path, hot_request: ConvertRequest
) -> None:
    huge = write_adapter(tmp_path / "huge", {name: array * 1e30 for name, array in adapter_tensors().items()})
    with pytest.raises(VerifyFailed, match="not finite"):
        convert(hot_request.model_copy(update={"adapter": huge}), store, Notes())
    assert files_under(store) == []


def test_an_end_of_turn_that_the_base_does_not_know_is_refused(store: Store, hot_request: ConvertRequest) -> None:
    stored = convert(hot_request, store, Notes())
    with pytest.raises(VerifyFailed, match="token 263 ends a turn of this adapter"):
        verify_adapter(Path(hot_request.source), stored.gguf, (263,), is_zero=False)


def test_an_adapter_of_another_base_does_not_load(store: Store, tmp_path: Path, hot_request: ConvertRequest) -> None:
    stored = convert(hot_request, store, Notes())
    other = write_model(tmp_path / "other.gguf", "llama")
    with pytest.raises(VerifyFailed, match="cannot be loaded on its base"):
        verify_adapter(other, stored.gguf, (), is_zero=False)


REFUSED: dict[str, tuple[Callable[[ConvertRequest], ConvertRequest], type[Exception], str]] = {
    "quant": (lambda r: r.model_copy(update={"quantization": "Q8_0"}), RequestInvalid, "leave out --quant"),
    "keep f16": (lambda r: r.model_copy(update={"keep_f16": True}), RequestInvalid, "--keep-f16"),
    "no adapter": (lambda r: r.model_copy(update={"adapter": None}), RequestInvalid, "--hot needs --adapter"),
    "no name": (lambda r: r.model_copy(update={"name": None}), RequestInvalid, "--name is missing"),
    "bad name": (lambda r: r.model_copy(update={"name": "a:b"}), StoreError, "'a:b' is not a model name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_before_anything_is_written(
    store: Store, hot_request: ConvertRequest, name: str
) -> None:
    change, kind, reason = REFUSED[name]
    with pytest.raises(kind, match=re.escape(reason)):
        convert(change(hot_request), store, Notes())
    assert files_under(store) == []


Q0, EMBEDDING = f"{PREFIX}layers.0.self_attn.q_proj", f"{PREFIX}embed_tokens"
MORE: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "use_dora": ({f"{Q0}.lora_magnitude_vector": np.ones(64)}, {"use_dora": True}, "model.layers.0.self_attn.q_proj"),
    "modules_to_save": ({f"{PREFIX}norm.weight": np.ones(64)}, {"modules_to_save": ["norm"]}, "model.norm.weight"),
    "bias": ({f"{Q0}.bias": np.ones(64)}, {"bias": "all"}, "model.layers.0.self_attn.q_proj.bias"),
    "lora_bias": ({f"{Q0}.lora_B.bias": np.ones(64)}, {"lora_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
    "trainable_token_indices": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": np.ones((1, 64))},
        {"trainable_token_indices": [5]},
        "model.embed_tokens",
    ),
    "a LoRA on the embedding": (
        {f"{EMBEDDING}.lora_embedding_A": np.ones((4, 267)), f"{EMBEDDING}.lora_embedding_B": np.ones((64, 4))},
        {},
        "model.embed_tokens",
    ),
}


def test_a_lora_on_a_tied_head_is_refused_and_on_an_own_head_is_not(
    store: Store, tmp_path: Path, hot_request: ConvertRequest
) -> None:
    head = {
        "base_model.model.lm_head.lora_A.weight": np.full((4, 64), 0.125),
        "base_model.model.lm_head.lora_B.weight": np.full((267, 4), 0.125) * np.arange(267)[:, None],
    }
    request = hot_request.model_copy(update={"adapter": write_adapter(tmp_path / "head", head)})
    with pytest.raises(
        AdapterInvalid, match=r"which this base ties to its embedding \('output\.weight'\).*leave out --hot"
    ):
        convert(request, store, Notes())
    own = write_model(tmp_path / "own.gguf", changes={"output.weight": np.ones((267, 64), np.float32)})
    assert convert(request.model_copy(update={"source": str(own)}), store, Notes()).gguf.is_file()


@pytest.mark.parametrize("what", MORE)
def test_changes_that_llama_cpp_cannot_apply_are_refused_with_a_remedy(
    store: Store, tmp_path: Path, hot_request: ConvertRequest, what: str
) -> None:
    tensors, config, where = MORE[what]
    pair = {name: array for name, array in adapter_tensors().items() if name.startswith(Q0)}
    more = write_adapter(tmp_path / "more", pair | tensors, **config)
    base = write_model(tmp_path / "biased.gguf", changes={"blk.0.attn_q.bias": np.zeros(64, np.float32)})
    with pytest.raises(AdapterInvalid) as caught:
        convert(hot_request.model_copy(update={"source": str(base), "adapter": more}), store, Notes())
    assert f"has {what} ({where!r}), which can be merged but not applied" in str(caught.value)
    assert "leave out --hot" in str(caught.value)
    assert files_under(store) == []


def test_an_installed_adapter_is_refused_as_a_source(store: Store, hot_request: ConvertRequest) -> None:
    convert(hot_request, store, Notes())
    with pytest.raises(RequestInvalid, match="'tuned' is a LoRA adapter without weights of its own"):
        convert(ConvertRequest(source="tuned", name="again"), store, Notes())


@pytest.mark.parametrize("stage", ["check", "write", "verify"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_a_failure_at_any_stage_leaves_the_store_as_it_was(
    store: Store, hot_request: ConvertRequest, stage: str, error: BaseException
) -> None:
    convert(hot_request, store, Notes())
    before = {name: (store.home / name).read_bytes() for name in files_under(store)}
    with pytest.raises(type(error)):
        convert(hot_request.model_copy(update={"replace": True}), store, Notes(stage, error))
    assert {name: (store.home / name).read_bytes() for name in files_under(store)} == before


def test_a_recipes_adapter_can_be_applied(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(
        ConvertRequest(source=str(write_model(tmp_path / "b.gguf")), name="tiny-base", quantization="F16"),
        store,
        Notes(),
    )
    folder = tmp_path / "recipe"
    write_adapter(folder / "adapter")
    figure = {"what": "merged", "split": "test", "correct": 1, "total": 2, "interval_low": 0.1, "interval_high": 0.9}
    manifest = {
        "name": "email-triage",
        "licence": "L",
        "task": "classify",
        "labels": ["a", "b"],
        "base": {"name": "tiny-base", "sha256": sha256_file(store.get("tiny-base").gguf)},
        "adapter": {"path": "adapter"},
        "quality": [figure],
    }
    (folder / MANIFEST_FILE).write_text(dump_manifest(Manifest.model_validate(manifest)))
    monkeypatch.setattr(CatalogEntry, "recipe_folder", lambda entry: folder)
    made = convert(ConvertRequest(source="email-triage", name="triage-hot", hot=True), store, Notes()).manifest
    assert made is not None
    assert (made.kind, made.labels, made.quality) == ("adapter", ("a", "b"), ())
    assert made.base is not None
    assert made.base.name == "tiny-base"
