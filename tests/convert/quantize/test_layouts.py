"""What is worth measuring: the ladder for each work and model, and which tensors a pattern decides about."""

from pathlib import Path

import gguf
import pytest

from convert.errors import QuantizationUnknown, RequestInvalid
from convert.gguf_writer import OutTensor
from convert.quantize.layouts import (
    LAYERS,
    VOCABULARY,
    CandidateSpec,
    TypeOverride,
    ladder,
    need_imatrix,
    plain,
    resolve,
)
from convert.quantize.quantize import QUANTIZATIONS
from models.gguf.header import Header, TensorInfo
from models.quality import TaskKind

Kind = gguf.GGMLQuantizationType


def tensors(width: int = 640, vocabulary: int = 262_144, *, tied: bool = True, layers: int = 2) -> list[OutTensor]:
    """The shapes of a small model."""
    made = [("token_embd.weight", (vocabulary, width)), ("output_norm.weight", (width,))]
    made += [] if tied else [("output.weight", (vocabulary, width))]
    for layer in range(layers):
        made += [(f"blk.{layer}.attn_norm.weight", (width,)), (f"blk.{layer}.attn_k.weight", (256, width))]
        made += [(f"blk.{layer}.attn_q.weight", (1024, width)), (f"blk.{layer}.attn_output.weight", (width, 1024))]
        made += [(f"blk.{layer}.ffn_{part}.weight", (2048, width)) for part in ("gate", "up")]
        made += [(f"blk.{layer}.ffn_down.weight", (width, 2048))]
    return [OutTensor(name, shape, Kind.F16 if len(shape) > 1 else Kind.F32) for name, shape in made]


def header(listed: list[OutTensor]) -> Header:
    infos = {item.name: TensorInfo(item.name, item.shape, item.kind, 0, item.n_bytes) for item in listed}
    return Header(Path("toy.gguf"), {}, infos, 32)


def names(specs: tuple[CandidateSpec, ...]) -> list[str]:
    return [spec.name for spec in specs]


PLAIN = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL"]


@pytest.mark.parametrize(
    ("work", "mixes"),
    [
        ("classify", ["F16-vocab-Q8_0", "F16-vocab-Q4_0", "Q8_0-vocab-Q4_0"]),
        ("write", ["Q8_0-vocab-Q4_0", "Q8_0-vocab-IQ4_NL", "Q4_0-vocab-Q4_0", "Q8_0-vocab-Q5_1"]),
    ],
)
def test_the_ladder_of_a_small_model(work: TaskKind, mixes: list[str]) -> None:
    specs = ladder(header(tensors()), work, imatrix=True)
    assert names(specs) == PLAIN + mixes
    assert len(set(names(specs))) == len(specs)
    assert {spec.quantization for spec in specs} <= QUANTIZATIONS.keys()
    for spec in specs:
        resolve(tensors(), spec)


def test_rows_that_fit_a_k_quant_may_have_one() -> None:
    found = names(ladder(header(tensors(width=768)), "write", imatrix=False))
    assert "Q8_0-vocab-Q6_K" in found
    assert "Q8_0-vocab-Q5_1" not in found


def test_a_small_vocabulary_gets_no_layout_of_its_own() -> None:
    specs = ladder(header(tensors(vocabulary=1000, layers=20)), "write", imatrix=False)
    assert names(specs) == [*PLAIN, "Q8_0-gate-up-Q4_0", "Q8_0-attn-Q4_0"]


@pytest.mark.parametrize(
    ("name", "parts"), [("Q8_0-gate-up-Q4_0", {"ffn_gate", "ffn_up"}), ("Q8_0-attn-Q4_0", {"attn_q", "attn_output"})]
)
def test_one_kind_of_matrix_is_in_4_bits(name: str, parts: set[str]) -> None:
    listed = tensors(vocabulary=1000)
    spec = next(spec for spec in ladder(header(listed), "write", imatrix=False) if spec.name == name)
    assert {tensor.split(".")[2] for tensor, kind in resolve(listed, spec).items() if kind == Kind.Q4_0} == parts
    without = [tensor for tensor in listed if tensor.name.split(".")[-2] not in parts]
    assert name not in names(ladder(header(without), "write", imatrix=False)), "it would be a plain one again"


def test_the_importance_matrix_is_used_by_what_learns_from_it() -> None:
    specs = ladder(header(tensors()), "classify", imatrix=True)
    without = {spec.name for spec in specs if not spec.imatrix}
    assert without == {"F16", "Q8_0", "F16-vocab-Q8_0"}
    mostly_layers = ladder(header(tensors(vocabulary=1000)), "classify", imatrix=True)
    assert {spec.name: spec.imatrix for spec in mostly_layers}["Q8_0-gate-up-Q4_0"]
    assert not any(spec.imatrix for spec in ladder(header(tensors()), "write", imatrix=False))


def test_f16_layers_with_another_vocabulary() -> None:
    spec = next(spec for spec in ladder(header(tensors()), "classify", imatrix=False) if spec.name == "F16-vocab-Q4_0")
    found = resolve(tensors(tied=False), spec)
    assert found.pop("token_embd.weight") == found.pop("output.weight") == Kind.Q4_0
    assert found == {item.name: Kind.F16 for item in tensors() if item.name.startswith("blk") and len(item.shape) > 1}


def test_the_first_pattern_that_matches_decides() -> None:
    first, second = TypeOverride(r"ffn_(up|down)", Kind.Q4_0), TypeOverride(LAYERS, Kind.Q6_K)
    found = resolve(tensors(layers=1), CandidateSpec("x", "Q8_0", overrides=(first, second)))
    assert {name: kind.name for name, kind in found.items()} == {
        **{f"blk.0.attn_{part}.weight": "Q6_K" for part in ("k", "q", "output")},
        "blk.0.ffn_gate.weight": "Q6_K",
        "blk.0.ffn_up.weight": "Q4_0",
        "blk.0.ffn_down.weight": "Q4_0",
    }
    with pytest.raises(RequestInvalid, match=r"the pattern 'ffn_\(up\|down\)' decides about no matrix"):
        resolve(tensors(), CandidateSpec("x", "Q8_0", overrides=(second, first)))


@pytest.mark.parametrize("pattern", ["norm", r"blk\.9\.", "^output"])
def test_a_pattern_that_decides_about_no_matrix_is_refused(pattern: str) -> None:
    with pytest.raises(RequestInvalid, match=r"candidate 'x': the pattern .* decides about no matrix of this model"):
        resolve(tensors(), CandidateSpec("x", "Q8_0", overrides=(TypeOverride(pattern, Kind.Q4_0),)))


def test_what_is_no_pattern_or_no_type_is_refused() -> None:
    with pytest.raises(RequestInvalid, match=r"'\(' is not a regular expression"):
        resolve(tensors(), CandidateSpec("x", "Q8_0", overrides=(TypeOverride("(", Kind.Q4_0),)))
    with pytest.raises(QuantizationUnknown, match="nothing is stored as Q8_K; known: BF16, F16"):
        resolve(tensors(), CandidateSpec("x", "Q8_0", overrides=(TypeOverride(LAYERS, Kind.Q8_K),)))
    with pytest.raises(RequestInvalid, match="overrides nothing in F16; take Q8_0"):
        resolve(tensors(), CandidateSpec("x", "F16", overrides=(TypeOverride(VOCABULARY, Kind.Q8_0),)))


def test_a_plain_name_overrides_nothing() -> None:
    assert resolve(tensors(), plain("Q4_K_M")) == {}


def test_types_that_need_an_importance_matrix_are_known() -> None:
    spec = CandidateSpec("x", "Q8_0", overrides=(TypeOverride("ffn_up", Kind.IQ2_S), TypeOverride("down", Kind.IQ4_XS)))
    assert need_imatrix(resolve(tensors(), spec)) == ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"]
