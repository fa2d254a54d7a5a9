"""Quantization of an F16 GGUF by llama.cpp's `llama_model_quantize`: mix, overrides and importance matrix.

The request is checked before llama.cpp starts, and the written file is read back: overrides must have changed exactly
the tensors they name, and matrices with rows that do not fit a type's blocks are counted.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.child import StepProgress, run_child
from convert.errors import ImatrixInvalid, QuantizationUnknown, QuantizeFailed, RequestInvalid
from convert.gguf_writer import OutTensor
from models.gguf.header import Header, TensorInfo, read_header

from .imatrix import read_imatrix
from .layouts import CandidateSpec, Tensor, fits, is_matrix, mixes, need_imatrix, plain, resolve

DEFAULT_QUANTIZATION = "Q8_0"
HALF_PRECISION = "F16"

# name -> llama.cpp's llama_ftype
QUANTIZATIONS: Mapping[str, int] = {
    HALF_PRECISION: 1,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_0": 2,
    "IQ4_NL": 25,
}
# Rows that do not fit a K-quant's block of 256 fall back to wider types: no more than Q8_0's 8.5 bits a weight.
_MOST_BITS = 8.5
_K_BLOCK = GGMLQuantizationType.Q4_K


@dataclass(frozen=True)
class QuantizeResult:
    """Tensors of a quantized file by kind; `fallbacks` are matrices with rows that do not fit the type's blocks."""

    kinds: Mapping[str, int]
    fallbacks: int


def spec_named(name: str, *, imatrix: bool) -> CandidateSpec:
    """The candidate called `name` (case is ignored): a mix of llama.cpp's own, or a mixed layout of ours.

    `imatrix`: use an importance matrix where it matters. Raises QuantizationUnknown, which lists the known names.
    """
    known = [*(plain(quantization, imatrix=imatrix) for quantization in QUANTIZATIONS), *mixes(imatrix=imatrix)]
    found = next((spec for spec in known if spec.name.upper() == name.upper()), None)
    if found is None:
        raise QuantizationUnknown(f"unknown quantization {name!r}; known are {', '.join(spec.name for spec in known)}")
    return found


def disk_need(file_bytes: int, tensors: Sequence[OutTensor], specs: Iterable[CandidateSpec]) -> int:
    """The most bytes that the F16 file, which holds `tensors`, and all candidates take together.

    The F16 candidate is the F16 file itself. Raises as `resolve` does.
    """
    return file_bytes + sum(_most_bytes(file_bytes, tensors, spec) for spec in specs if not _is_f16(spec))


def quantize(
    source: Path,
    target: Path,
    spec: CandidateSpec,
    imatrix: Path | None,
    progress: StepProgress,
) -> QuantizeResult:
    """Write `source` quantized to `target`. `progress` is called with (tensors done, tensors in all).

    `imatrix` is used if `spec` asks for it. Raises BadGguf for the source; RequestInvalid when a pattern matches
    nothing, or an importance matrix is asked for or needed and missing; ImatrixInvalid when it is damaged or another
    model's; QuantizeFailed with llama.cpp's last error. An interrupted or failed run leaves no `target`.
    """
    if spec.quantization not in QUANTIZATIONS:
        raise QuantizationUnknown(f"candidate {spec.name!r}: llama.cpp has no mix {spec.quantization!r} here")
    ftype = QUANTIZATIONS[spec.quantization]
    header = read_header(source)
    kinds = resolve(header.tensors.values(), spec)
    _check_imatrix(header, spec, kinds, imatrix)
    job = {
        "source": str(source),
        "target": str(target),
        "ftype": ftype,
        "kinds": {name: int(kind) for name, kind in kinds.items()},
        "imatrix": str(imatrix) if spec.imatrix else None,
    }
    try:
        code, complaint = run_child("convert.quantize.quantize_child", job, progress)
        if code != 0 or not target.is_file():
            message = f"{source.name!r} could not be quantized to {spec.name} (exit code {code}): {complaint}"
            raise QuantizeFailed(message)
        return _written(read_header(target), spec, kinds)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _check_imatrix(
    header: Header, spec: CandidateSpec, kinds: Mapping[str, GGMLQuantizationType], imatrix: Path | None
) -> None:
    if spec.imatrix and imatrix is None:
        raise RequestInvalid(f"candidate {spec.name!r} asks for an importance matrix, and there is none")
    needy = need_imatrix(kinds)
    if needy and not spec.imatrix:
        raise RequestInvalid(
            f"candidate {spec.name!r}: {needy[0]!r} cannot be stored as {kinds[needy[0]].name} without an "
            "importance matrix; collect one, or choose another type"
        )
    if not spec.imatrix or imatrix is None:
        return
    entries = read_imatrix(imatrix).entries
    for name, entry in entries.items():
        tensor = header.tensors.get(name)
        if tensor is None or entry.sums.size != _columns(tensor):
            needed = "no such tensor" if tensor is None else f"{_columns(tensor)} columns"
            raise ImatrixInvalid(
                f"{str(imatrix)!r} was collected on another model: {name!r} has {entry.sums.size} columns in it, "
                f"{needed} in {header.path.name!r}"
            )
    if missing := [name for name in needy if name not in entries]:
        raise RequestInvalid(
            f"candidate {spec.name!r}: {missing[0]!r} cannot be stored as {kinds[missing[0]].name}, the importance "
            f"matrix {str(imatrix)!r} holds nothing for it"
        )


def _columns(tensor: TensorInfo) -> int:
    experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
    return tensor.shape[-1] * experts


def _written(header: Header, spec: CandidateSpec, kinds: Mapping[str, GGMLQuantizationType]) -> QuantizeResult:
    for name, kind in kinds.items():
        tensor = header.tensors[name]
        if tensor.kind != kind and fits(tensor, kind):
            raise QuantizeFailed(
                f"candidate {spec.name!r}: {name!r} was to be stored as {kind.name}, llama.cpp wrote {tensor.kind.name}"
            )
    tensors = list(header.tensors.values())
    fallbacks = sum(is_matrix(tensor) and not fits(tensor, _meant(tensor, spec, kinds)) for tensor in tensors)
    return QuantizeResult(Counter(tensor.kind.name for tensor in tensors), fallbacks)


def _meant(tensor: Tensor, spec: CandidateSpec, kinds: Mapping[str, GGMLQuantizationType]) -> GGMLQuantizationType:
    """A kind with the block size of the requested one."""
    if "_K" in spec.quantization:
        return kinds.get(tensor.name, _K_BLOCK)
    return kinds.get(tensor.name, GGMLQuantizationType[spec.quantization])


def _is_f16(spec: CandidateSpec) -> bool:
    return spec.quantization == HALF_PRECISION and not spec.overrides


def _most_bytes(file_bytes: int, tensors: Sequence[OutTensor], spec: CandidateSpec) -> int:
    kinds = resolve(tensors, spec)
    saved = sum(
        tensor.n_bytes * (1 - _most_bits(tensor, spec, kinds) / 16)
        for tensor in tensors
        if tensor.kind == GGMLQuantizationType.F16
    )
    return file_bytes - int(saved)


def _most_bits(tensor: OutTensor, spec: CandidateSpec, kinds: Mapping[str, GGMLQuantizationType]) -> float:
    if tensor.name not in kinds:
        return 16 if spec.quantization == HALF_PRECISION else _MOST_BITS
    block, block_bytes = GGML_QUANT_SIZES[kinds[tensor.name]]
    bits = 8 * int(block_bytes) / int(block)
    return bits if fits(tensor, kinds[tensor.name]) else max(bits, _MOST_BITS)
