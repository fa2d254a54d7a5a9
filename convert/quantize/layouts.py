"""The candidates of a ladder: plain quantizations, and mixed layouts that suit the work.

A name such as Q4_K_M is one of llama.cpp's own mixes. A mixed layout adds overrides, patterns over tensor names,
which fit the work: prefill multiplies by the layers for every token and by the vocabulary for the last one only, decode
reads all weights once for each token. llama.cpp's mixes ignore both machine and work.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.errors import QuantizationUnknown, RequestInvalid
from models.gguf.header import Header
from models.quality import TaskKind

PLAIN = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")

# llama.cpp quantizes to these kinds only with an importance matrix
_NEEDS_IMATRIX = {"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}
OVERRIDE_KINDS = {
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S"),
    *_NEEDS_IMATRIX,
}
# Quantizing to these kinds ignores the importance matrix.
_IGNORES_IMATRIX = {"F16", "BF16", "Q8_0"}

TASK_KINDS: tuple[TaskKind, ...] = ("classify", "write")
LAYERS = r"^blk\."
VOCABULARY = r"^(token_embd|output)\.weight$"
_WIDE_FFN = r"^blk\.\d+\.ffn_(gate|up)\.weight$"
_WIDE_ATTENTION = r"^blk\.\d+\.attn_(q|output)\.weight$"
# Vocabulary matrices below this share of the weights are not worth a layout of their own.
_NOTABLE_SHARE = 0.1
_MAJORITY = 0.5
_NEVER_QUANTIZED = re.compile(r"_norm\.weight$|ffn_gate_inp\.weight$")


@dataclass(frozen=True)
class TypeOverride:
    """An order to store as `kind` the matrices with a name that the regular expression `pattern` matches."""

    pattern: str
    kind: GGMLQuantizationType


@dataclass(frozen=True)
class CandidateSpec:
    """A file to be made: `quantization`, except for the matrices of `overrides` (the first match counts).

    `imatrix`: quantized with the importance matrix. `name` is part of the file's name.
    """

    name: str
    quantization: str
    imatrix: bool = False
    overrides: tuple[TypeOverride, ...] = ()


class Tensor(Protocol):
    """A tensor, in a file or to be written; `shape` in numpy's order."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def plain(quantization: str, *, imatrix: bool = False) -> CandidateSpec:
    """The candidate of llama.cpp's own mix `quantization`, with the importance matrix, if any, where it matters."""
    return CandidateSpec(quantization, quantization, imatrix and quantization not in _IGNORES_IMATRIX)


def ladder(header: Header, work: TaskKind, *, imatrix: bool) -> tuple[CandidateSpec, ...]:
    """The candidates worth measuring for the model of `header` and this work.

    `imatrix`: an importance matrix exists, collected with `output`, so that it weights the vocabulary, too. A mix that
    would equal a plain one is left out: a small vocabulary, rows that fit no K-quant.
    """
    matrices = [tensor for tensor in header.tensors.values() if is_matrix(tensor)]
    vocabulary = [tensor for tensor in matrices if re.search(VOCABULARY, tensor.name)]
    share = sum(tensor.n_elements for tensor in vocabulary) / max(1, sum(tensor.n_elements for tensor in matrices))
    blocks = all(tensor.shape[-1] % 256 == 0 for tensor in vocabulary)
    specs = [plain(name, imatrix=imatrix) for name in PLAIN]
    if share >= _NOTABLE_SHARE:
        specs += _vocabulary_mixes(work, imatrix=imatrix, k_quants=blocks)
    if share < _MAJORITY:
        specs += [
            spec
            for spec in _layer_mixes(imatrix=imatrix)
            if any(re.search(override.pattern, tensor.name) for override in spec.overrides for tensor in matrices)
        ]
    return tuple(specs)


def mixes(*, imatrix: bool) -> tuple[CandidateSpec, ...]:
    """Every mixed layout of any ladder, for all models and kinds of work."""
    found = [
        spec
        for work in TASK_KINDS
        for k_quants in (True, False)
        for spec in _vocabulary_mixes(work, imatrix=imatrix, k_quants=k_quants)
    ]
    return tuple(dict.fromkeys([*found, *_layer_mixes(imatrix=imatrix)]))


def _layer_mixes(*, imatrix: bool) -> list[CandidateSpec]:
    """One kind of the layers' matrices in 4 bits, all else in 8.

    Gate and up are half of a layer. Query and output are the wide ones of attention; key and value, which several heads
    share, would save little. With the importance matrix they lose the least for what they save in Gemma 3 270M (KL
    divergence 0.002 for a tenth of the file; gate, up or down alone 0.004 to 0.006; without the matrix 0.006).
    In a model that is mostly vocabulary all of it saves too little (Gemma 3 270M, gate and up: 8 % of the file, 0.39
    nats).
    """
    kinds = GGMLQuantizationType
    return [
        CandidateSpec("Q8_0-gate-up-Q4_0", "Q8_0", imatrix, (TypeOverride(_WIDE_FFN, kinds.Q4_0),)),
        CandidateSpec("Q8_0-attn-Q4_0", "Q8_0", imatrix, (TypeOverride(_WIDE_ATTENTION, kinds.Q4_0),)),
    ]


def _vocabulary_mixes(work: TaskKind, *, imatrix: bool, k_quants: bool) -> list[CandidateSpec]:
    """The layers in one type, embedding and output matrix in another.

    classify: layers in the types that prefill fastest, F16 on plain vector units and Q8_0 where llama.cpp repacks it or
    has tiles for it (AMX); the vocabulary is read for a row or two a request, and only takes memory.
    write: the output matrix is read for every token, so it is made small; what it loses is not passed on from layer to
    layer. llama.cpp's own mixes do the reverse and keep it at Q6_K or Q8_0.
    Types that are repacked (Q8_0, Q4_0, IQ4_NL) or need no unpacking (F16), and one of about 6 bits between them.
    """
    kinds = GGMLQuantizationType
    if work == "classify":
        pairs = [("F16", kinds.Q8_0), ("F16", kinds.Q4_0), ("Q8_0", kinds.Q4_0)]
    else:
        pairs = [("Q8_0", kinds.Q4_0), ("Q8_0", kinds.IQ4_NL), ("Q4_0", kinds.Q4_0)]
        pairs += [("Q8_0", kinds.Q6_K if k_quants else kinds.Q5_1)]
    return [_mix(layers, vocabulary, imatrix=imatrix) for layers, vocabulary in pairs]


def _mix(layers: str, vocabulary: GGMLQuantizationType, *, imatrix: bool) -> CandidateSpec:
    overrides = [TypeOverride(VOCABULARY, vocabulary)]
    if layers == "F16":  # llama.cpp applies overrides only when it quantizes: here the layers are the override
        overrides.append(TypeOverride(LAYERS, GGMLQuantizationType.F16))
    base = "Q8_0" if layers == "F16" else layers
    learns = not {layers, vocabulary.name} <= _IGNORES_IMATRIX
    return CandidateSpec(f"{layers}-vocab-{vocabulary.name}", base, imatrix and learns, tuple(overrides))


def is_matrix(tensor: Tensor) -> bool:
    """True if llama.cpp quantizes the tensor: not a vector, norm or expert gate."""
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not _NEVER_QUANTIZED.search(tensor.name)


def resolve(tensors: Iterable[Tensor], spec: CandidateSpec) -> dict[str, GGMLQuantizationType]:
    """Tensor name -> the kind that overrides its own.

    Raises RequestInvalid for a pattern that is not a regular expression or decides about no matrix, and for overrides
    of F16, which llama.cpp would ignore; QuantizationUnknown for a kind that no tensor can be stored as.
    """
    if spec.overrides and spec.quantization == "F16":
        raise RequestInvalid(
            f"candidate {spec.name!r}: llama.cpp overrides nothing in F16; take Q8_0 and override the rest to F16"
        )
    patterns = [_compiled(override, spec) for override in spec.overrides]
    found: dict[str, GGMLQuantizationType] = {}
    decides = [False] * len(patterns)
    for tensor in tensors:
        first = next((i for i, pattern in enumerate(patterns) if pattern.search(tensor.name)), None)
        if first is not None and is_matrix(tensor):
            found[tensor.name] = spec.overrides[first].kind
            decides[first] = True
    for override, used in zip(spec.overrides, decides, strict=True):
        if not used:
            raise RequestInvalid(
                f"candidate {spec.name!r}: the pattern {override.pattern!r} decides about no matrix of this model"
            )
    return found


def need_imatrix(kinds: Mapping[str, GGMLQuantizationType]) -> list[str]:
    """The tensors among the overridden ones that cannot be written without an importance matrix."""
    return [name for name, kind in kinds.items() if kind.name in _NEEDS_IMATRIX]


def fits(tensor: Tensor, kind: GGMLQuantizationType) -> bool:
    """True if the tensor's rows are multiples of `kind`'s blocks; llama.cpp falls back to another kind if not."""
    return tensor.shape[-1] % int(GGML_QUANT_SIZES[kind][0]) == 0


def _compiled(override: TypeOverride, spec: CandidateSpec) -> re.Pattern[str]:
    if override.kind.name not in OVERRIDE_KINDS:
        known = ", ".join(sorted(OVERRIDE_KINDS))
        raise QuantizationUnknown(f"candidate {spec.name!r}: nothing is stored as {override.kind.name}; known: {known}")
    try:
        return re.compile(override.pattern)
    except re.error as error:
        raise RequestInvalid(
            f"candidate {spec.name!r}: {override.pattern!r} is not a regular expression: {error}"
        ) from error
