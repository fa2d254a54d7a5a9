"""Whole conversions of a tiny model through the real llama.cpp: what is installed, and that nothing half-made is."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert.errors import (
    AdapterInvalid,
    ArchitectureUnknown,
    ConvertError,
    QuantizationUnknown,
    RequestInvalid,
    SourceInvalid,
    VerifyFailed,
)
from convert.pipeline import convert
from convert.planning.request import ConvertRequest
from models.common.files import sha256_file
from models.errors import BadGguf, ModelError, ModelNotFound, StoreError
from models.gguf.header import read_header
from models.manifest import Adapter as AdapterRecord
from models.manifest import Base, Manifest, dump_manifest
from models.store.store import Store
from tests.support.convert.tiny import END, adapter_tensors, hash_tensors, write_adapter, write_model
from tests.support.models.gguf_heads import head


class Notes:
    """A reporter that remembers, and can be told to fail when a stage begins."""

    def __init__(self, fail_at: str = "", error: BaseException | None = None) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[tuple[int, int | None]] = []
        self._fail_at, self._error = fail_at, error

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)
        if self._error is not None and name.startswith(self._fail_at):
            raise self._error

    def advance(self, done: int, total: int | None = None, detail: str = "") -> None:
        self.steps.append((done, total))

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def close(self) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def request_for_tiny(tmp_path: Path) -> ConvertRequest:
    base, adapter = write_model(tmp_path / "base.gguf"), write_adapter(tmp_path / "adapter")
    return ConvertRequest(source=str(base), name="tiny", adapter=adapter)


def files_under(store: Store) -> list[str]:
    """Every file of the store but the locks that it keeps."""
    paths = (path for path in store.home.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return sorted(str(path.relative_to(store.home)) for path in paths)


def test_a_model_is_merged_quantized_and_installed(store: Store, request_for_tiny: ConvertRequest) -> None:
    notes = Notes()
    stored = convert(request_for_tiny, store, notes)
    assert files_under(store) == [f"models/tiny/{name}" for name in ("README.md", "model.toml", "tiny-Q8_0.gguf")]
    store.verify("tiny")
    manifest = stored.manifest
    assert manifest is not None
    assert [artefact.quantization for artefact in manifest.artefacts] == ["Q8_0"]
    assert manifest.base == Base(name="base", sha256=sha256_file(Path(request_for_tiny.source)))
    assert request_for_tiny.adapter is not None
    weights = request_for_tiny.adapter / "adapter_model.safetensors"
    assert manifest.adapter == AdapterRecord(path="adapter", sha256=sha256_file(weights), rank=4)
    assert manifest.licence == "tiny-licence"
    assert manifest.artefacts[0].sha256 in (stored.folder / "README.md").read_text()
    assert [stage.split()[0] for stage in notes.stages] == ["check", "merge", "quantize", "verify"]
    assert notes.warnings == []
    assert notes.steps


def test_template_and_end_of_turn_are_in_the_file(store: Store, request_for_tiny: ConvertRequest) -> None:
    fields = gguf.GGUFReader(convert(request_for_tiny, store, Notes()).gguf).fields
    assert "<start_of_turn>" in fields["tokenizer.chat_template"].contents()
    assert fields["tokenizer.ggml.eot_token_id"].contents() == END
    assert fields["general.name"].contents() == "tiny"


def test_a_mixed_layout_is_made_by_its_name(store: Store, request_for_tiny: ConvertRequest) -> None:
    request = request_for_tiny.model_copy(update={"quantization": "q8_0-vocab-q4_0"})
    stored = convert(request, store, Notes())
    assert stored.manifest is not None
    assert [artefact.quantization for artefact in stored.manifest.artefacts] == ["Q8_0-vocab-Q4_0"]
    assert stored.gguf.name == "tiny-Q8_0-vocab-Q4_0.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(stored.gguf).tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_up.weight"]) == ("Q4_0", "Q8_0")


def test_rows_that_do_not_fit_a_mixed_layout_are_told(store: Store, request_for_tiny: ConvertRequest) -> None:
    notes = Notes()
    convert(request_for_tiny.model_copy(update={"quantization": "Q8_0-vocab-Q6_K"}), store, notes)
    assert notes.warnings == [
        "1 of the matrices have rows that do not fit the types of Q8_0-vocab-Q6_K: llama.cpp stored them in wider ones"
    ]


def test_the_unquantized_file_is_kept_when_asked(store: Store, request_for_tiny: ConvertRequest) -> None:
    stored = convert(request_for_tiny.model_copy(update={"keep_f16": True}), store, Notes())
    assert stored.manifest is not None
    assert [a.quantization for a in stored.manifest.artefacts] == ["Q8_0", "F16"]
    assert stored.gguf.name == "tiny-Q8_0.gguf"
    store.verify("tiny")


def test_without_an_adapter_the_weights_stay(store: Store, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "llama", kind=gguf.GGMLQuantizationType.F16, template="{{ messages }}")
    stored = convert(ConvertRequest(source=str(base), name="same", quantization="f16"), store, Notes())
    before, after = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (base, stored.gguf))
    assert set(before) == set(after)
    assert all(np.array_equal(before[name].data, after[name].data) for name in before)


def test_a_converted_model_keeps_its_task_when_it_is_converted_again(
    store: Store, tmp_path: Path, request_for_tiny: ConvertRequest
) -> None:
    given = Manifest(name="any", task="classify", labels=("a", "b"), licence="L", licence_notice="N", description="D")
    (tmp_path / "mine.toml").write_text(dump_manifest(given))
    first = request_for_tiny.model_copy(update={"manifest": tmp_path / "mine.toml", "quantization": "F16"})
    convert(first, store, Notes())
    stored = convert(ConvertRequest(source="tiny", name="again", quantization="Q4_0"), store, Notes())
    assert stored.manifest is not None
    assert (stored.manifest.labels, stored.manifest.licence_notice) == (("a", "b"), "N")
    assert stored.manifest.base is not None
    assert stored.manifest.base.name == "tiny"
    tuned = convert(
        ConvertRequest(source="tiny", name="tuned", adapter=request_for_tiny.adapter), store, Notes()
    ).manifest
    assert tuned is not None
    assert (tuned.task, tuned.labels, tuned.licence_notice) == ("general", (), "N")


def test_the_same_conversion_gives_the_same_file(store: Store, request_for_tiny: ConvertRequest) -> None:
    first = convert(request_for_tiny, store, Notes()).gguf.read_bytes()
    second = convert(request_for_tiny.model_copy(update={"replace": True}), store, Notes()).gguf.read_bytes()
    assert first == second


def test_merging_onto_a_grid_and_back_onto_it_is_warned_about(store: Store, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", kind=gguf.GGMLQuantizationType.Q4_0)
    adapter, notes = write_adapter(tmp_path / "adapter"), Notes()
    convert(ConvertRequest(source=str(base), name="lost", adapter=adapter, quantization="Q4_0"), store, notes)
    assert "14 of 14 fine-tuned matrices" in notes.warnings[0]
    assert "(Q4_0)" in notes.warnings[0]
    notes = Notes()
    convert(ConvertRequest(source=str(base), name="kept", adapter=adapter, quantization="Q8_0"), store, notes)
    assert notes.warnings == []


def test_an_untrained_adapter_is_warned_about(store: Store, tmp_path: Path, request_for_tiny: ConvertRequest) -> None:
    zero = write_adapter(tmp_path / "zero", {name: 0 * array for name, array in adapter_tensors().items()})
    notes = Notes()
    convert(request_for_tiny.model_copy(update={"adapter": zero, "quantization": "F16"}), store, notes)
    assert "never trained" in notes.warnings[0]


def wrong_shape(tmp_path: Path) -> ConvertRequest:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": np.ones((4, 640)), f"{stem}.lora_B.weight": np.ones((1024, 4))}
    return ConvertRequest(
        source=str(write_model(tmp_path / "b.gguf")), name="x", adapter=write_adapter(tmp_path / "a", tensors)
    )


def unknown_family(tmp_path: Path) -> ConvertRequest:
    source = write_model(tmp_path / "b.gguf", "llama")
    source.write_bytes(source.read_bytes().replace(b"llama", b"lemma", 1))
    return ConvertRequest(source=str(source), name="x", adapter=write_adapter(tmp_path / "a"))


def truncated(tmp_path: Path) -> ConvertRequest:
    source = write_model(tmp_path / "b.gguf")
    source.write_bytes(source.read_bytes()[:-100])
    return ConvertRequest(source=str(source), name="x")


def one_part(tmp_path: Path) -> ConvertRequest:
    (tmp_path / "b.gguf").write_bytes(head({"split.count": 3}))
    return ConvertRequest(source=str(tmp_path / "b.gguf"), name="x")


REFUSED: dict[str, tuple[Callable[[Path], ConvertRequest], type[Exception], str]] = {
    "no name": (lambda t: ConvertRequest(source=str(write_model(t / "b.gguf"))), RequestInvalid, "--name is missing"),
    "bad name": (
        lambda t: ConvertRequest(source=str(write_model(t / "b.gguf")), name="../x"),
        StoreError,
        "'../x' is not a model name",
    ),
    "no source": (lambda t: ConvertRequest(source="nowhere", name="x"), ModelNotFound, "'nowhere'"),
    "quantization": (lambda t: ConvertRequest(source="b", name="x", quantization="Q9"), QuantizationUnknown, "'Q9'"),
    "no adapter": (
        lambda t: ConvertRequest(source=str(write_model(t / "b.gguf")), name="x", adapter=t / "no"),
        AdapterInvalid,
        "not a PEFT",
    ),
    "wrong shape": (wrong_shape, AdapterInvalid, "'model.layers.0.self_attn.q_proj'"),
    "family": (unknown_family, ArchitectureUnknown, "'lemma'"),
    "truncated": (truncated, BadGguf, "is truncated"),
    "split": (one_part, SourceInvalid, "one of 3 parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_before_anything_is_written(store: Store, tmp_path: Path, name: str) -> None:
    make, kind, reason = REFUSED[name]
    notes = Notes()
    with pytest.raises(kind, match=re.escape(reason)):
        convert(make(tmp_path), store, notes)
    assert files_under(store) == []
    assert not [stage for stage in notes.stages if not stage.startswith("check")]


@pytest.mark.parametrize("stage", ["check", "merge", "quantize", "verify"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_a_failure_at_any_stage_leaves_the_store_as_it_was(
    store: Store, request_for_tiny: ConvertRequest, stage: str, error: BaseException
) -> None:
    convert(request_for_tiny.model_copy(update={"quantization": "F16"}), store, Notes())
    before = {name: (store.home / name).read_bytes() for name in files_under(store)}
    again = request_for_tiny.model_copy(update={"quantization": "Q4_0", "replace": True})
    with pytest.raises(type(error)):
        convert(again, store, Notes(stage, error))
    assert {name: (store.home / name).read_bytes() for name in files_under(store)} == before
    assert not [path for path in (store.home / "staging").iterdir() if path.is_dir()]


def test_a_taken_name_is_refused_before_the_work(store: Store, request_for_tiny: ConvertRequest) -> None:
    convert(request_for_tiny.model_copy(update={"quantization": "F16"}), store, Notes())
    notes = Notes()
    with pytest.raises(StoreError, match="is installed already"):
        convert(request_for_tiny, store, notes)
    assert notes.stages == ["check base.gguf"]


def test_too_little_disk_is_noticed_first(
    store: Store, request_for_tiny: ConvertRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed_bytes: int) -> None:
        raise StoreError(f"{needed_bytes} bytes are needed")

    monkeypatch.setattr("convert.pipeline.check_free", full)
    notes = Notes()
    with pytest.raises(StoreError, match=r"\d{6} bytes are needed"):
        convert(request_for_tiny, store, notes)
    assert notes.stages == ["check base.gguf"]
    assert files_under(store) == []


def test_a_model_whose_logits_are_not_finite_is_not_installed(store: Store, tmp_path: Path) -> None:
    """Weights that are finite but overflow in use: only running the file shows it."""
    huge = {
        "output_norm.weight": np.full(64, 3e38, np.float32),
        "token_embd.weight": np.full((267, 64), 6e4, np.float32),
    }
    source = write_model(tmp_path / "b.gguf", changes=huge)
    with pytest.raises(VerifyFailed, match=r"logits are (not finite|.*say nothing)|all \d+ logits"):
        convert(ConvertRequest(source=str(source), name="x", quantization="F16"), store, Notes())
    assert files_under(store) == []


def test_every_error_is_one_of_ours() -> None:
    kinds = {kind for _, kind, _ in REFUSED.values()}
    assert all(issubclass(kind, ConvertError | ModelError) for kind in kinds)


def test_the_adapter_config_that_peft_writes_is_understood(tmp_path: Path, store: Store) -> None:
    """All fields of PEFT 0.21's LoraConfig at their defaults, as save_pretrained writes them."""
    written: dict[str, object] = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "kasa_config": None, "lora_ga_config": None, "monteclora_config": None,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None, "target_modules": ["q_proj"],
        "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False, "use_bdlora": None, "velora_config": None,
    }  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    assert (
        convert(
            ConvertRequest(source=str(write_model(tmp_path / "b.gguf")), name="x", adapter=adapter), store, Notes()
        ).name
        == "x"
    )


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_a_gguf_that_is_fine_is_kept_as_it_is(store: Store, tmp_path: Path, kind: str) -> None:
    source = write_model(
        tmp_path / "base.gguf", "llama", kind=gguf.GGMLQuantizationType[kind], template="{{ messages }}"
    )
    notes = Notes()
    stored = convert(ConvertRequest(source=str(source), name="mine", quantization="Keep"), store, notes)
    assert stored.manifest is not None
    assert [artefact.quantization for artefact in stored.manifest.artefacts] == [kind]
    assert hash_tensors(stored.gguf) == hash_tensors(source)
    kinds = {name: info.kind for name, info in read_header(source).tensors.items()}
    assert {name: info.kind for name, info in read_header(stored.gguf).tensors.items()} == kinds
    assert read_header(stored.gguf).text("general.name") == "mine"
    assert [stage.split()[0] for stage in notes.stages] == ["check", "write", "verify"]
    store.verify("mine")


def test_weights_that_must_change_cannot_be_kept(
    store: Store, request_for_tiny: ConvertRequest, tmp_path: Path
) -> None:
    keeping = request_for_tiny.model_copy(update={"quantization": "keep"})
    with pytest.raises(RequestInvalid, match="--quant keep leaves the weights as they are: leave it out, or --adapter"):
        convert(keeping, store, Notes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(RequestInvalid, match="is a checkpoint: use F16"):
        convert(keeping.model_copy(update={"adapter": None, "source": str(folder)}), store, Notes())
