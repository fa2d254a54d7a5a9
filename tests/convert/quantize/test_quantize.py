"""Quantizing through llama.cpp: real files of each kind, its errors as ours, nothing left behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.errors import ImatrixInvalid, QuantizationUnknown, QuantizeFailed, RequestInvalid
from convert.gguf_writer import OutTensor
from convert.quantize.imatrix import Imatrix, ImatrixEntry, collect, read_imatrix, write_imatrix
from convert.quantize.layouts import VOCABULARY, CandidateSpec, TypeOverride, ladder, plain
from convert.quantize.quantize import QUANTIZATIONS, disk_need, quantize, spec_named
from models.errors import BadGguf
from models.gguf.header import Header, read_header
from models.quality import TaskKind
from tests.support.convert.tiny import hash_tensors, write_model

Kind = gguf.GGMLQuantizationType
FFN_UP = r"ffn_up\.weight$"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("half") / "half.gguf", kind=Kind.F16)


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory, half: Path) -> Path:
    target = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    collect(half, [[2, 10, 11, 200, 90], [2, 263, 264, 265]], target, silent)
    return target


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.kind.name for tensor in read_header(path).tensors.values()}


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_it_writes_the_quantization_asked_for(tmp_path: Path, half: Path, name: str) -> None:
    target, steps = tmp_path / "out.gguf", []
    written = quantize(half, target, plain(name), None, lambda done, total: steps.append((done, total)))
    found = kinds(target)
    if name != "Q4_K_M":
        assert found["blk.0.ffn_up.weight"] == name
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert read_header(target).integer("general.file_type") == QUANTIZATIONS[name]
    assert steps[-1] == (len(found), len(found))
    assert written.kinds == {kind: list(found.values()).count(kind) for kind in found.values()}
    # rows of 64 and 96 do not fit a K-quant's block: llama.cpp falls back, tensor by tensor
    assert written.fallbacks == (15 if name == "Q4_K_M" else 0)
    need = disk_need(half.stat().st_size, out_tensors(read_header(half)), [plain(name)])
    metadata_bytes = 1024  # llama.cpp adds a field or two
    assert half.stat().st_size + target.stat().st_size <= need + metadata_bytes
    assert need < 2 * half.stat().st_size


def test_overrides_reach_exactly_the_tensors_named(tmp_path: Path, half: Path) -> None:
    overrides = (TypeOverride(r"blk\.0\.ffn_up", Kind.F16), TypeOverride(VOCABULARY, Kind.Q4_0))
    spec = CandidateSpec("mixed", "Q8_0", overrides=overrides)
    written = quantize(half, tmp_path / "out.gguf", spec, None, silent)
    quantize(half, tmp_path / "plain.gguf", plain("Q8_0"), None, silent)
    expected = kinds(tmp_path / "plain.gguf") | {"blk.0.ffn_up.weight": "F16", "token_embd.weight": "Q4_0"}
    assert kinds(tmp_path / "out.gguf") == expected
    assert (written.kinds["F16"], written.kinds["Q4_0"], written.fallbacks) == (1, 1, 0)


def test_a_fallback_of_an_override_is_counted(tmp_path: Path, half: Path) -> None:
    spec = CandidateSpec("mixed", "Q8_0", overrides=(TypeOverride(VOCABULARY, Kind.Q4_K),))
    assert quantize(half, tmp_path / "out.gguf", spec, None, silent).fallbacks == 1
    assert kinds(tmp_path / "out.gguf")["token_embd.weight"] == "Q5_0"


def test_a_matrix_collected_with_the_output_weighs_the_vocabulary(tmp_path: Path, half: Path) -> None:
    collect(half, [[2, 10, 11, 200, 90]], tmp_path / "imatrix.gguf", silent, output=True)
    spec = CandidateSpec("mixed", "Q8_0", imatrix=True, overrides=(TypeOverride(VOCABULARY, Kind.Q4_0),))
    quantize(half, tmp_path / "weighted.gguf", spec, tmp_path / "imatrix.gguf", silent)
    quantize(half, tmp_path / "plain.gguf", replace(spec, imatrix=False), None, silent)
    before, after = hash_tensors(tmp_path / "plain.gguf"), hash_tensors(tmp_path / "weighted.gguf")
    assert {name for name in before if before[name] != after[name]} == {"token_embd.weight"}


@pytest.mark.parametrize("name", ["Q4_0", "IQ4_NL", "Q4_K_M", "Q8_0"])
def test_the_importance_matrix_changes_what_can_learn_from_it(
    tmp_path: Path, half: Path, imatrix: Path, name: str
) -> None:
    quantize(half, tmp_path / "plain.gguf", plain(name), None, silent)
    quantize(half, tmp_path / "weighted.gguf", CandidateSpec(name, name, imatrix=True), imatrix, silent)
    before, after = hash_tensors(tmp_path / "plain.gguf"), hash_tensors(tmp_path / "weighted.gguf")
    changed = {tensor for tensor, digest in before.items() if after[tensor] != digest}
    learns = {tensor for tensor, kind in kinds(tmp_path / "weighted.gguf").items() if kind not in {"F32", "Q8_0"}}
    assert changed == learns & read_imatrix(imatrix).entries.keys()
    assert bool(changed) == (name != "Q8_0")


def test_the_importance_matrix_weighs_the_error(tmp_path: Path, half: Path, imatrix: Path) -> None:
    """What it is for: columns that matter are rounded better, at the cost of the others."""
    name = "blk.1.ffn_up.weight"
    entries = dict(read_imatrix(imatrix).entries)
    sums = np.full((1, 64), 1e-3, np.float32)
    sums[0, ::8] = 1e3
    write_imatrix(tmp_path / "steep.gguf", Imatrix(entries | {name: ImatrixEntry(sums, np.array([1]))}, 1, 64))
    exact = weights_of(half, name)
    errors = {}
    for label, spec, given in (
        ("plain", plain("Q4_0"), None),
        ("steep", CandidateSpec("Q4_0", "Q4_0", imatrix=True), tmp_path / "steep.gguf"),
    ):
        quantize(half, tmp_path / f"{label}.gguf", spec, given, silent)
        errors[label] = np.square(weights_of(tmp_path / f"{label}.gguf", name) - exact).mean(axis=0)
    assert errors["steep"][::8].mean() < 0.5 * errors["plain"][::8].mean()
    assert errors["steep"].mean() > errors["plain"].mean()


def weights_of(path: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


def test_a_spec_without_it_ignores_an_importance_matrix(tmp_path: Path, half: Path, imatrix: Path) -> None:
    quantize(half, tmp_path / "a.gguf", plain("Q4_0"), None, silent)
    quantize(half, tmp_path / "b.gguf", plain("Q4_0"), imatrix, silent)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CandidateSpec("x", "Q4_0", imatrix=True), "candidate 'x' asks for an importance matrix, and there is none"),
        (
            CandidateSpec("x", "Q8_0", overrides=(TypeOverride(FFN_UP, Kind.IQ2_XS),)),
            r"'blk\.0\.ffn_up\.weight' cannot be stored as IQ2_XS without an importance matrix",
        ),
        (CandidateSpec("x", "Q8_0", overrides=(TypeOverride("nothing", Kind.Q4_0),)), "'nothing' decides about no"),
        (CandidateSpec("x", "Q3_X"), r"candidate 'x': llama\.cpp has no mix 'Q3_X' here"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    tmp_path: Path, half: Path, spec: CandidateSpec, message: str
) -> None:
    with pytest.raises(RequestInvalid, match=message):
        quantize(half, tmp_path / "out.gguf", spec, None, silent)
    assert not (tmp_path / "out.gguf").exists()


def test_a_type_that_needs_an_entry_is_refused_where_there_is_none(tmp_path: Path, half: Path, imatrix: Path) -> None:
    """llama.cpp would let the vocabulary pass, and abort."""
    spec = CandidateSpec("x", "Q8_0", imatrix=True, overrides=(TypeOverride(VOCABULARY, Kind.IQ3_XXS),))
    with pytest.raises(RequestInvalid, match=r"'token_embd\.weight' cannot be stored as IQ3_XXS, .* holds nothing"):
        quantize(half, tmp_path / "out.gguf", spec, imatrix, silent)


@pytest.mark.parametrize(
    ("name", "message"),
    [("blk.7.ffn_up.weight", "no such tensor"), ("blk.0.ffn_up.weight", r"has 32 columns in it, 64 columns in")],
)
def test_another_models_importance_matrix_is_refused(tmp_path: Path, half: Path, name: str, message: str) -> None:
    write_imatrix(tmp_path / "other", Imatrix({name: ImatrixEntry(np.ones((1, 32), np.float32), np.array([1]))}, 1, 64))
    with pytest.raises(ImatrixInvalid, match=message):
        quantize(half, tmp_path / "out.gguf", CandidateSpec("x", "Q4_0", imatrix=True), tmp_path / "other", silent)


def test_experts_are_weighted_each_by_its_own(tmp_path: Path) -> None:
    half = write_model(tmp_path / "half.gguf", "llama", kind=Kind.F16, experts=4)
    collect(half, [list(range(2, 60))], tmp_path / "imatrix.gguf", silent)
    spec = CandidateSpec("Q4_0", "Q4_0", imatrix=True)
    quantize(half, tmp_path / "weighted.gguf", spec, tmp_path / "imatrix.gguf", silent)
    quantize(half, tmp_path / "plain.gguf", plain("Q4_0"), None, silent)
    name = "blk.0.ffn_up_exps.weight"
    assert hash_tensors(tmp_path / "weighted.gguf")[name] != hash_tensors(tmp_path / "plain.gguf")[name]


def test_what_llama_cpp_says_is_in_the_error(tmp_path: Path, half: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(half.read_bytes().replace(b"gemma3", b"gemmaX"))
    with pytest.raises(QuantizeFailed, match=r"'bad\.gguf' could not be quantized to Q8_0 .*unknown .*architecture"):
        quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf", plain("Q8_0"), None, silent)
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(BadGguf, match=r"'GGUF'"):
        quantize(tmp_path / "bad.gguf", tmp_path / "out.gguf", plain("Q8_0"), None, silent)


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path, half: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(half, tmp_path / "out.gguf", plain("Q8_0"), None, interrupt)
    assert not (tmp_path / "out.gguf").exists()


def test_what_a_dying_child_has_written_is_removed(tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(module: str, job: dict[str, Any], progress: object) -> tuple[int, str]:
        Path(job["target"]).write_bytes(b"half of it")
        return -6, "GGML_ASSERT(false) failed"

    monkeypatch.setattr("convert.quantize.quantize.run_child", dies)
    with pytest.raises(QuantizeFailed, match=r"\(exit code -6\): GGML_ASSERT"):
        quantize(half, tmp_path / "out.gguf", plain("Q8_0"), None, silent)
    assert not (tmp_path / "out.gguf").exists()


def test_names_are_checked_whatever_their_case() -> None:
    assert spec_named("q4_k_m", imatrix=True) == CandidateSpec("Q4_K_M", "Q4_K_M", imatrix=True)
    assert spec_named("q8_0", imatrix=True) == plain("Q8_0")
    with pytest.raises(
        QuantizationUnknown, match=r"'Q3_X'; known are F16, Q8_0, .*, F16-vocab-Q8_0, .*-gate-up-Q4_0, Q8_0-attn-Q4_0$"
    ):
        spec_named("Q3_X", imatrix=False)


@pytest.mark.parametrize("work", ["classify", "write"])
@pytest.mark.parametrize("imatrix", [True, False])
def test_what_a_ladder_has_can_be_asked_for_by_its_name(half: Path, work: TaskKind, imatrix: bool) -> None:
    for spec in ladder(read_header(half), work, imatrix=imatrix):
        assert spec_named(spec.name.lower(), imatrix=imatrix) == spec


def test_the_mixes_of_a_ladder_are_made_and_fit_the_disk(tmp_path: Path, half: Path, imatrix: Path) -> None:
    header = read_header(half)
    specs = [*ladder(header, "classify", imatrix=True), *ladder(header, "write", imatrix=True)]
    mixes = list(dict.fromkeys(spec for spec in specs if spec.overrides))
    made = []
    for spec in mixes:
        quantize(half, tmp_path / "out.gguf", spec, imatrix, silent)
        made.append((tmp_path / "out.gguf").stat().st_size)
    need = disk_need(half.stat().st_size, out_tensors(header), mixes)
    metadata_bytes = 1024 * len(mixes)
    assert half.stat().st_size + sum(made) <= need + metadata_bytes
    assert need < half.stat().st_size * (1 + len(mixes))


def test_the_half_precision_file_is_its_own_candidate(half: Path) -> None:
    n_bytes = half.stat().st_size
    assert disk_need(n_bytes, out_tensors(read_header(half)), [plain("F16")]) == n_bytes


def out_tensors(header: Header) -> list[OutTensor]:
    return [OutTensor(tensor.name, tensor.shape, tensor.kind) for tensor in header.tensors.values()]
