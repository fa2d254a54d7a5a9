"""The order of a conversion, and nothing else: gather, plan, merge and write, quantize, verify, install.

A hot adapter is not merged and nothing of it is quantized: gather, plan, write, verify on its base, install.

Everything that can be wrong with the inputs is found before the first byte is written; everything that is written lies
in the store's staging folder until it is whole.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.card import render_card
from models.files import check_free, sha256_file, write_atomic
from models.gguf_fields import Field
from models.gguf_header import Header, read_header
from models.manifest import MANIFEST_FILE, Artefact, dump_manifest
from models.store import Store, StoredModel

from .checkpoint import Checkpoint
from .gguf_file import Layout, OutTensor, write_gguf
from .hot import FULL_PRECISION, check_hot, plan_hot, verify_hot
from .inputs import ConvertRequest, Inputs, gather
from .lora_fit import Fitted, fit
from .merge import Merged, file_rows, half_precision_kind, merged_header
from .progress import Reporter
from .quantize import HALF_PRECISION, QUANTIZATIONS, disk_need, quantize
from .template import END_OF_TURN_FIELD, TEMPLATE_FIELD, ChatFormat, choose_format
from .verify import verify_runs

# Kinds whose steps are so fine that a fine-tune survives being rounded to its base's grid (measured: Q8_0).
_FINE_KINDS = {"F32", "F16", "BF16", "Q8_0"}
_DROPPED_PREFIXES = ("split.", "quantize.imatrix.")


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that was found possible: what the half-precision file will hold, and the changes by tensor name."""

    layout: Layout
    fitted: Fitted
    chat: ChatFormat


def convert(request: ConvertRequest, store: Store, report: Reporter) -> StoredModel:
    """Make the model the request describes and install it.

    Raises ConvertError for what is wrong with the request, the adapter or the weights, ModelError for the source file
    and the store. An error or an interrupt at any time leaves the store as it was.
    """
    inputs = gather(request, store, report)
    if request.hot:
        _make_hot(inputs, request, store, report)
    else:
        _make_model(inputs, request, store, report)
    report.close()
    return store.get(inputs.manifest.name)


def _make_model(inputs: Inputs, request: ConvertRequest, store: Store, report: Reporter) -> None:
    with (
        Checkpoint(inputs.gguf) as checkpoint,
        store.staging(inputs.manifest.name, replace=request.replace) as folder,
    ):
        plan = plan_conversion(checkpoint.header, inputs)
        _warn(plan.chat, plan.fitted, inputs, report)
        check_free(folder, disk_need(plan.layout.file_bytes, plan.layout.matrix_bytes, inputs.quantization))
        half = _write_half_precision(checkpoint, plan, folder / _file_name(inputs, HALF_PRECISION), report)
        final = _quantize(half, folder, inputs, report)
        _warn_same_grid(checkpoint.header, plan, final, report)
        report.stage("verify")
        verify_runs(final, plan.chat)
        kept = [final, half] if request.keep_f16 and half != final else [final]
        if half not in kept:
            half.unlink()
        _describe(folder, kept, inputs, inputs.quantization)


def _make_hot(inputs: Inputs, request: ConvertRequest, store: Store, report: Reporter) -> None:
    assert inputs.adapter is not None, "gather lets no hot conversion without an adapter pass"
    with store.staging(inputs.manifest.name, replace=request.replace) as folder:
        header = read_header(inputs.gguf)
        fitted = fit(inputs.adapter, header)
        check_hot(inputs.adapter, fitted)
        chat = choose_format(header, inputs.adapter.folder)
        plan = plan_hot(header, fitted.loras, chat, inputs.manifest.name, inputs.manifest.licence)
        _warn(chat, fitted, inputs, report)
        check_free(folder, plan.layout.file_bytes)
        report.stage(f"write {len(fitted.loras)} pairs of matrices", plan.layout.data_bytes)
        target = folder / _file_name(inputs, FULL_PRECISION)
        write_gguf(target, plan.layout, plan.rows, _counted(plan.layout, report))
        report.stage("verify")
        verify_hot(inputs.gguf, target, chat, is_zero=inputs.adapter.is_zero)
        _describe(folder, [target], inputs, FULL_PRECISION)


def plan_conversion(header: Header, inputs: Inputs) -> ConversionPlan:
    """Check that the adapter fits and the chat format is usable. Raises ConvertError; writes nothing."""
    adapter = inputs.adapter
    fitted = fit(adapter, header) if adapter is not None else Fitted()
    chat = choose_format(header, adapter.folder if adapter is not None else None)
    infos = merged_header(header, fitted).tensors.values()
    tensors = [OutTensor(info.name, info.shape, half_precision_kind(info)) for info in infos]
    return ConversionPlan(Layout(_fields(header, inputs, chat), tensors, header.alignment), fitted, chat)


def _fields(header: Header, inputs: Inputs, chat: ChatFormat) -> dict[str, Field]:
    fields = {key: field for key, field in header.fields.items() if not key.startswith(_DROPPED_PREFIXES)}
    fields["general.name"] = Field.string(inputs.manifest.name)
    fields["general.file_type"] = Field.uint32(QUANTIZATIONS[HALF_PRECISION])
    if chat.template is not None:
        fields[TEMPLATE_FIELD] = Field.string(chat.template)
    if chat.end_of_turn is not None:
        fields[END_OF_TURN_FIELD] = Field.uint32(chat.end_of_turn)
    return fields


def _write_half_precision(checkpoint: Checkpoint, plan: ConversionPlan, target: Path, report: Reporter) -> Path:
    changes = plan.fitted.changes
    stage = f"merge {len(changes)} tensors, write {HALF_PRECISION}" if changes else "write F16"
    report.stage(stage, plan.layout.data_bytes)

    merged = Merged(checkpoint, plan.fitted)

    def rows(name: str) -> Iterator[np.ndarray]:
        return file_rows(merged, merged.header.tensors[name])

    write_gguf(target, plan.layout, rows, _counted(plan.layout, report))
    return target


def _counted(layout: Layout, report: Reporter) -> Callable[[int], None]:
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report.advance(done, layout.data_bytes)

    return advance


def _quantize(half: Path, folder: Path, inputs: Inputs, report: Reporter) -> Path:
    if inputs.quantization == HALF_PRECISION:
        return half
    report.stage(f"quantize to {inputs.quantization}")
    final = folder / _file_name(inputs, inputs.quantization)
    quantize(half, final, inputs.quantization, report.advance)
    return final


def _file_name(inputs: Inputs, quantization: str) -> str:
    return f"{inputs.manifest.name}-{quantization}.gguf"


def _warn(chat: ChatFormat, fitted: Fitted, inputs: Inputs, report: Reporter) -> None:
    for warning in (*chat.warnings, *fitted.warnings):
        report.warn(warning)
    if inputs.adapter is not None and inputs.adapter.is_zero:
        report.warn(f"the adapter {str(inputs.adapter.folder)!r} is all zero: it was never trained and changes nothing")


def _warn_same_grid(source: Header, plan: ConversionPlan, final: Path, report: Reporter) -> None:
    """A base that was quantized lies on a grid; rounding the merged weights to the same grid can undo the fine-tune."""
    written, loras = read_header(final).tensors, plan.fitted.loras
    before = merged_header(source, plan.fitted).tensors
    same = [name for name in loras if written[name].kind == before[name].kind]
    kinds = Counter(written[name].kind.name for name in same if written[name].kind.name not in _FINE_KINDS)
    if kinds:
        report.warn(
            f"{kinds.total()} of {len(loras)} fine-tuned matrices are quantized to the grid their base lay on "
            f"already ({', '.join(sorted(kinds))}). A LoRA's change is smaller than a step of it, so THE FINE-TUNE MAY "
            "BE ROUNDED AWAY. Use --quant Q8_0 or F16, or a base in full precision, and measure on your own examples"
        )


def _describe(folder: Path, files: list[Path], inputs: Inputs, quantization: str) -> None:
    artefacts = tuple(
        Artefact(
            file=file.name,
            quantization=quantization if index == 0 else HALF_PRECISION,
            size_bytes=file.stat().st_size,
            sha256=sha256_file(file),
        )
        for index, file in enumerate(files)
    )
    manifest = inputs.manifest.model_copy(update={"artefacts": artefacts})
    write_atomic(folder / MANIFEST_FILE, dump_manifest(manifest))
    write_atomic(folder / "README.md", render_card(manifest))
