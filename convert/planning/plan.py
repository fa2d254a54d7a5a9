"""The plan of an F16 file, complete before its first byte is written, and the function that writes it.

Weights pass through a chain of checkpoints: the source, then with the adapter merged, then with the vocabulary trimmed.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from convert.checkpoint.source import Checkpoint, GgufCheckpoint
from convert.errors import SourceInvalid
from convert.gguf_writer import Layout, OutTensor, Rows, write_gguf
from convert.lora.fit import Fitted, MergedCheckpoint, fit, merged_header
from convert.measure.examples import texts_of
from convert.quantize.quantize import HALF_PRECISION, QUANTIZATIONS
from convert.tokenizer.chat_template import END_OF_TURN_FIELD, TEMPLATE_FIELD, ChatFormat
from convert.tokenizer.spacing import general_name, name_part
from convert.trim.plan import TrimmedCheckpoint, TrimPlan, plan_trim, tokenizer_of
from models.common.console import Reporter
from models.gguf.fields import Field
from models.gguf.header import Header, TensorInfo
from runtime.llama.ggml import to_half

from .inputs import Inputs
from .speech import speech_of

_FILE_TYPE = "general.file_type"
_DROPPED_PREFIXES = ("split.", "quantize.imatrix.")


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that passed all checks.

    `checkpoint` is the end of the chain, `untrimmed` the link before trimming. `header` describes `untrimmed`, with the
    fields of the file; `base_header` the source, with the tensor types that its weights were rounded to.
    `chat.end_of_turn` is a token id of the file.
    """

    checkpoint: Checkpoint
    untrimmed: Checkpoint
    header: Header
    base_header: Header
    fitted: Fitted
    chat: ChatFormat
    trim: TrimPlan | None
    layout: Layout


def plan_conversion(source: Checkpoint, inputs: Inputs) -> ConversionPlan:
    """Check that the adapter fits, the chat format is usable and the vocabulary can be cut. Writes nothing.

    Raises AdapterInvalid, ArchitectureUnknown, TemplateInvalid, TrimImpossible, RequestInvalid, BadExamples.
    """
    adapter, manifest = inputs.adapter, inputs.manifest
    fitted = fit(adapter, source.header) if adapter is not None else Fitted()
    speech = speech_of(source.header, source, adapter.folder if adapter is not None else None)
    speech = speech.showing(_answers(inputs))
    fitted = replace(fitted, warnings=(*fitted.warnings, *speech.warnings))
    chat = speech.chat
    untrimmed = MergedCheckpoint(source, fitted)
    base_header = merged_header(source.header, fitted)
    header = replace(untrimmed.header, fields=_fields(speech.header, manifest.name, chat))
    if inputs.trim is None:
        return ConversionPlan(untrimmed, untrimmed, header, base_header, fitted, chat, None, layout_of(header))
    texts = texts_of(header, tokenizer_of(header), inputs.trim.records, manifest.prompt)
    trim = plan_trim(header, texts, inputs.trim.keep)
    trimmed = TrimmedCheckpoint(untrimmed, trim)
    if chat.end_of_turn is not None:
        chat = replace(chat, end_of_turn=int(trim.new_ids[chat.end_of_turn]))
    return ConversionPlan(trimmed, untrimmed, header, base_header, fitted, chat, trim, layout_of(trimmed.header))


def _answers(inputs: Inputs) -> Iterator[str]:
    """The texts that users send and get, as far as they are known."""
    yield from inputs.manifest.labels
    for records in (inputs.examples, inputs.trim):
        for record in records.records if records is not None else ():
            yield record.answer
            yield from (message.content for message in record.prompt)


def layout_of(header: Header) -> Layout:
    """The layout of the F16 file with the tensors and fields of `header`."""
    tensors = [OutTensor(info.name, info.shape, half_precision_kind(info)) for info in header.tensors.values()]
    return Layout(header.fields, tensors, header.alignment)


def base_of(source: Checkpoint, plan: ConversionPlan) -> tuple[Checkpoint, Layout]:
    """The checkpoint without the adapter, with the fine-tune's chat format and vocabulary, for comparison with it."""
    header = replace(source.header, fields=plan.header.fields)
    if plan.trim is None:
        return source, layout_of(header)
    trimmed = TrimmedCheckpoint(source, plan.trim)
    return trimmed, layout_of(trimmed.header)


def write_f16(
    checkpoint: Checkpoint,
    layout: Layout,
    target: Path,
    stage: str,
    report: Reporter,
    watch: Callable[[], None] = lambda: None,
) -> str:
    """Write the F16 file and return its sha256. `watch` is called after each piece, and may stop the write by raising.

    Raises SourceInvalid, VerifyFailed and what `watch` raises; no file is left then.
    """

    def rows(name: str) -> Iterator[np.ndarray]:
        return file_rows(checkpoint, checkpoint.header.tensors[name])

    return _write(rows, layout, target, stage, report, watch)


def kept_layout(plan: ConversionPlan) -> tuple[str, Layout]:
    """The quantization's name and the layout of a file with the plan's fields and the source's own weights."""
    source = plan.base_header
    tensors = [OutTensor(info.name, info.shape, info.kind) for info in source.tensors.values()]
    fields = {key: field for key, field in plan.header.fields.items() if key != _FILE_TYPE}
    if _FILE_TYPE in source.fields:
        fields[_FILE_TYPE] = source.fields[_FILE_TYPE]
    return _file_type(source), Layout(fields, tensors, source.alignment)


def write_kept(
    source: GgufCheckpoint, layout: Layout, target: Path, report: Reporter, watch: Callable[[], None] = lambda: None
) -> str:
    """Write `layout` with the weights as `source` has them, and return the sha256. Raises as `write_f16` does."""

    def rows(name: str) -> Iterator[np.ndarray]:
        return source.stored(source.header.tensors[name])

    return _write(rows, layout, target, "write the weights as they are", report, watch)


def half_precision_kind(tensor: TensorInfo) -> GGMLQuantizationType:
    """F16 for matrices, F32 for tensors that llama.cpp keeps in it: one-dimensional ones, norms, expert routers."""
    stays = len(tensor.shape) == 1 or tensor.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
    return GGMLQuantizationType.F32 if stays else GGMLQuantizationType.F16


def file_rows(source: Checkpoint, tensor: TensorInfo, kind: GGMLQuantizationType | None = None) -> Iterator[np.ndarray]:
    """Yield the tensor's rows as `kind` (F16 or F32), by default `half_precision_kind`.

    Raises SourceInvalid when a value is not finite or too large for float16.
    """
    wanted = half_precision_kind(tensor) if kind is None else kind
    dtype = np.float16 if wanted == GGMLQuantizationType.F16 else np.float32
    for _, rows in source.slabs(tensor):
        out = to_half(rows) if dtype == np.float16 else rows
        if not _is_finite(out):
            worst = float(np.abs(rows).max())
            raise SourceInvalid(
                f"tensor {tensor.name!r} cannot be written as {np.dtype(dtype).name}: "
                f"its largest magnitude is {worst:g}, the limit is {float(np.finfo(dtype).max):g}"
            )
        yield out


def _file_type(header: Header) -> str:
    """The name of the file's quantization: as it says, else the kind that most of its weights have."""
    field = header.fields.get(_FILE_TYPE)
    if field is not None and field.value in set(LlamaFileType):
        named: str = LlamaFileType(field.value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        if named != "GUESSED":
            return named
    sizes = Counter[str]()
    for info in header.tensors.values():
        sizes[info.kind.name] += info.n_bytes
    return sizes.most_common(1)[0][0]


def _write(rows: Rows, layout: Layout, target: Path, stage: str, report: Reporter, watch: Callable[[], None]) -> str:
    report.stage(stage, layout.data_bytes)
    count = byte_counter(layout, report)

    def advance(n_bytes: int) -> None:
        count(n_bytes)
        watch()

    return write_gguf(target, layout, rows, advance)


def byte_counter(layout: Layout, report: Reporter) -> Callable[[int], None]:
    """A callback for `write_gguf` that adds up the bytes of each piece and reports the sum."""
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report.advance(done, layout.data_bytes)

    return count


def _fields(header: Header, name: str, chat: ChatFormat) -> dict[str, Field]:
    fields = {key: field for key, field in header.fields.items() if not key.startswith(_DROPPED_PREFIXES)}
    before = header.fields.get("general.name")
    marker = name_part(before.value) if before is not None and isinstance(before.value, str) else ""
    fields["general.name"] = Field.string(general_name(name, marker))
    fields[_FILE_TYPE] = Field.uint32(QUANTIZATIONS[HALF_PRECISION])
    if chat.template is not None:
        fields[TEMPLATE_FIELD] = Field.string(chat.template)
    if chat.end_of_turn is not None:
        fields[END_OF_TURN_FIELD] = Field.uint32(chat.end_of_turn)
    return fields


def _is_finite(values: np.ndarray) -> bool:
    """False if any exponent is all ones; many times faster than numpy's isfinite on half floats."""
    if values.dtype == np.float16:
        return int((values.view(np.uint16) & np.uint16(0x7C00)).max()) != 0x7C00
    return int((values.view(np.uint32) & np.uint32(0x7F80_0000)).max()) != 0x7F80_0000
