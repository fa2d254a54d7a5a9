"""The order of a conversion, and nothing else: gather, plan, write and prove, measure and choose, verify, install.

A hot adapter is not merged and nothing of it is quantized: gather, plan, write, verify on its base, install.

Everything that can be wrong with the inputs is found before the first byte is written; everything that is written lies
in the store's staging folder until it is whole. Only what was measured outlives a stopped run, for the next one.
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from convert.checkpoint.folder import HfCheckpoint
from convert.checkpoint.source import Checkpoint, open_checkpoint
from convert.lora.fit import Fitted, fit
from convert.lora.gguf_adapter import FULL_PRECISION, check_appliable, plan_adapter
from convert.planning.inputs import ConvertRequest, Inputs, gather
from convert.planning.plan import ConversionPlan, base_of, counted, layout_of, plan_conversion, write_f16
from convert.proof.adapter import verify_adapter
from convert.proof.proof import Proof
from convert.proof.runs import verify_runs
from convert.quantize.imatrix import IMATRIX_FILE
from convert.quantize.quantize import HALF_PRECISION, disk_need, quantize, spec_named
from convert.selection.by_examples import choose_by_examples
from convert.selection.choice import shared_grid, undo_cause
from convert.tokenizer.chat_template import ChatFormat, choose_format
from models.card.card import render_card
from models.card.plot import PLOT_FILE, render_plot
from models.common.console import Reporter
from models.common.files import check_free, discard, sha256_file, sync, write_atomic
from models.common.machine import give_back_freed
from models.gguf.header import Header, read_header
from models.manifest import MANIFEST_FILE, Artefact, Conversion, dump_manifest
from models.quality import Quality, read_quality, write_quality
from models.store.store import Store, StoredModel

from .gguf_writer import check_written, write_gguf

RESULTS = "measured"


def convert(request: ConvertRequest, store: Store, report: Reporter) -> StoredModel:
    """Make the model the request describes and install it.

    Raises ConvertError for what is wrong with the request, the adapter or the weights, ModelError for the source file
    and the store. An error or an interrupt at any time leaves the models as they were.
    """
    inputs = gather(request, store, report)
    if request.hot:
        _make_hot(inputs, request, store, report)
    else:
        _make_model(inputs, request, store, report)
    report.close()
    return store.get(inputs.manifest.name)


def _make_model(inputs: Inputs, request: ConvertRequest, store: Store, report: Reporter) -> None:
    with ExitStack() as stack:
        proof = Proof(inputs.origin.folder) if inputs.origin.folder is not None else None
        if proof is not None:
            stack.callback(proof.close)
        source = stack.enter_context(closing(open_checkpoint(inputs.origin.path)))
        read_back: set[str] = set()
        staging = store.staging(inputs.manifest.name, replace=request.replace, read_back=read_back)
        folder = stack.enter_context(staging)
        if proof is not None:
            stack.callback(proof.close)  # before the folder goes that it reads from
        plan = plan_conversion(source, inputs)
        _warn(source, plan.chat, plan.fitted, inputs, report)
        work = folder / "work"
        work.mkdir()
        if proof is not None:
            records = inputs.examples.records if inputs.examples is not None else ()
            proof.begin(_named(source.header, plan), records, work)
        check_free(folder, _disk_need(plan, inputs))
        f16 = work / _file_name(inputs, HALF_PRECISION)
        watch = (lambda: None) if proof is None else partial(proof.check, report)
        sha256 = write_f16(plan.source, plan.layout, f16, _stage(plan), report, watch)
        if proof is not None:
            proof.end(report)
        quality, final = _choose(f16, sha256, source, plan, inputs, store, report)
        if quality is None:
            _warn_same_grid(plan, final, report)
        hashes = {f16: sha256}
        report.stage("verify")
        give_back_freed()  # the model is in memory next, in a process of its own
        verify_runs(final, plan.chat, partial(_read_back, final, hashes))
        if inputs.measured is not None:
            quality = _known_ladder(inputs.measured, hashes[final])
        kept = [final, f16] if request.keep_f16 and f16 != final else [final]
        read_back |= {path.name for path in kept}
        if (imatrix := _imatrix_to_keep(inputs, quality, work)) is not None:
            shutil.copyfile(imatrix, folder / IMATRIX_FILE)
        _describe(folder, {path.rename(folder / path.name): hashes[path] for path in kept}, inputs, quality, plan)
        discard(work)


def _named(header: Header, plan: ConversionPlan) -> Header:
    """The checkpoint's own header under the model's name, by which llama.cpp tells habits of its tokenizer."""
    return replace(header, fields={**header.fields, "general.name": plan.header.fields["general.name"]})


def _read_back(final: Path, hashes: dict[Path, str]) -> None:
    """What is to be installed: its sha256, known or not, is what the disk holds, and it is really on the disk."""
    if final in hashes:
        check_written(final, hashes[final])
    else:
        hashes[final] = sha256_file(final)
    sync(final)


def _known_ladder(folder: Path, sha256: str) -> Quality | None:
    """The recipe's own measurements, if they are of the very file that was made."""
    quality = read_quality(folder)
    chosen = next(one for one in quality.candidates if one.name == quality.chosen)
    return quality if chosen.sha256 == sha256 else None


def _imatrix_to_keep(inputs: Inputs, quality: Quality | None, work: Path) -> Path | None:
    """What the file was rounded by, if anything. What a recipe builds is told by the recipe, which has its own."""
    if inputs.examples is None or quality is None:
        return inputs.imatrix if inputs.manifest.conversion is None else None
    chosen = next(one for one in quality.candidates if one.name == quality.chosen)
    return work / IMATRIX_FILE if chosen.imatrix else None


def _choose(
    f16: Path, sha256: str, source: Checkpoint, plan: ConversionPlan, inputs: Inputs, store: Store, report: Reporter
) -> tuple[Quality | None, Path]:
    """The file to install, and how it was chosen; without examples it is the one that was asked for.

    What others are made from is read back before; what is installed, while it is verified.
    """
    if inputs.examples is None and inputs.quantization == HALF_PRECISION:
        return None, f16
    check_written(f16, sha256)
    if inputs.examples is None:
        return None, _quantized(f16, inputs, report)
    untrimmed = base = None
    if plan.trim is not None:
        untrimmed = f16.with_name("whole.gguf")
        write_f16(plan.untrimmed, layout_of(plan.header), untrimmed, "write F16 before trimming", report)
    if inputs.adapter is not None:
        base = _base(source, plan, inputs, f16.with_name("base.gguf"), report)
    return choose_by_examples(f16, base, untrimmed, plan, inputs, store.home / RESULTS, report)


def _base(source: Checkpoint, plan: ConversionPlan, inputs: Inputs, target: Path, report: Reporter) -> Path:
    """A file of the model before its fine-tuning: the source itself, where that is a GGUF with the same vocabulary."""
    if inputs.origin.path.is_file() and plan.trim is None:
        return inputs.origin.path
    before, layout = base_of(source, plan)
    write_f16(before, layout, target, "write the base", report)
    return target


def _quantized(f16: Path, inputs: Inputs, report: Reporter) -> Path:
    quantization = inputs.quantization
    assert quantization is not None, "gather leaves the choice to examples only"
    report.stage(f"quantize to {quantization}")
    final = f16.with_name(_file_name(inputs, quantization))
    spec = spec_named(quantization, imatrix=inputs.imatrix is not None)
    written = quantize(f16, final, spec, inputs.imatrix, report.advance)
    if spec.overrides and written.fallbacks:
        report.warn(
            f"{written.fallbacks} of the matrices have rows that do not fit the types of {quantization}: llama.cpp "
            "stored them in wider ones"
        )
    return final


def _disk_need(plan: ConversionPlan, inputs: Inputs) -> int:
    """Of the files that are surely written; what the ladder needs it checks when it knows the candidates."""
    specs = [spec_named(inputs.quantization or HALF_PRECISION, imatrix=False)]
    n_halves = 1 if inputs.examples is None else 1 + (plan.trim is not None) + (inputs.adapter is not None)
    return disk_need(plan.layout.file_bytes, plan.layout.tensors, specs) * n_halves


def _stage(plan: ConversionPlan) -> str:
    changes = plan.fitted.changes
    trimmed = "" if plan.trim is None else f", {len(plan.trim.kept)} of {plan.trim.n_before} tokens"
    return f"merge {len(changes)} tensors, write F16{trimmed}" if changes else f"write F16{trimmed}"


def _make_hot(inputs: Inputs, request: ConvertRequest, store: Store, report: Reporter) -> None:
    assert inputs.adapter is not None, "gather lets no hot conversion without an adapter pass"
    with store.staging(inputs.manifest.name, replace=request.replace) as folder:
        base = inputs.origin.path
        header = read_header(base)
        fitted = fit(inputs.adapter, header)
        check_appliable(inputs.adapter, fitted)
        chat = choose_format(header, inputs.adapter.folder)
        plan = plan_adapter(header, fitted.loras, chat, inputs.manifest.name, inputs.manifest.licence)
        _warn(None, chat, fitted, inputs, report)
        check_free(folder, plan.layout.file_bytes)
        report.stage(f"write {len(fitted.loras)} pairs of matrices", plan.layout.data_bytes)
        target = folder / _file_name(inputs, FULL_PRECISION)
        sha256 = write_gguf(target, plan.layout, plan.rows, counted(plan.layout, report))
        report.stage("verify")
        verify_adapter(base, target, chat, is_zero=inputs.adapter.is_zero)
        _describe(folder, {target: sha256}, inputs, None, None)


def _file_name(inputs: Inputs, quantization: str) -> str:
    return f"{inputs.manifest.name}-{quantization}.gguf"


def _warn(source: Checkpoint | None, chat: ChatFormat, fitted: Fitted, inputs: Inputs, report: Reporter) -> None:
    of_folder = source.warnings if isinstance(source, HfCheckpoint) else ()
    for warning in dict.fromkeys((*of_folder, *chat.warnings, *fitted.warnings)):
        report.warn(warning)
    if inputs.adapter is not None and inputs.adapter.is_zero:
        report.warn(f"the adapter {str(inputs.adapter.folder)!r} is all zero: it was never trained and changes nothing")


def _warn_same_grid(plan: ConversionPlan, final: Path, report: Reporter) -> None:
    """A base that was quantized lies on a grid; rounding the merged weights to the same grid can undo the fine-tune."""
    tuned = plan.fitted.loras
    if tuned and (grid := shared_grid(plan.base_header, read_header(final), tuned)):
        report.warn(
            f"{undo_cause(grid, len(tuned))}: THE FINE-TUNE MAY BE ROUNDED AWAY. Use --quant Q8_0 or F16, or a base in "
            "full precision, and measure on your own examples (--examples)"
        )


def _describe(
    folder: Path, files: Mapping[Path, str], inputs: Inputs, quality: Quality | None, plan: ConversionPlan | None
) -> None:
    """Manifest and card of `files`, in the order of preference, each with its sha256."""
    artefacts = tuple(_artefact(file, sha256, inputs) for file, sha256 in files.items())
    changes: dict[str, object] = {"base": inputs.base, "artefacts": artefacts}
    if inputs.manifest.conversion is None and plan is not None:
        keep = len(plan.trim.kept) if plan.trim is not None else 0
        imatrix = IMATRIX_FILE if (folder / IMATRIX_FILE).is_file() else ""
        changes["conversion"] = Conversion(quantization=artefacts[0].quantization, imatrix=imatrix, keep=keep)
    manifest = inputs.manifest.model_copy(update=changes)
    write_atomic(folder / MANIFEST_FILE, dump_manifest(manifest))
    if quality is not None:
        write_quality(folder, quality)
        if (plot := render_plot(quality)) is not None:
            write_atomic(folder / PLOT_FILE, plot)
    write_atomic(folder / "README.md", render_card(manifest, quality))


def _artefact(file: Path, sha256: str, inputs: Inputs) -> Artefact:
    quantization = file.stem.removeprefix(f"{inputs.manifest.name}-")
    return Artefact(file=file.name, quantization=quantization, size_bytes=file.stat().st_size, sha256=sha256)
