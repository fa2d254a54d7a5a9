"""The steps of a conversion in order: gather, plan, write and prove, measure and choose, verify, install.

A `--hot` adapter is neither merged nor quantized: gather, plan, write, verify on its base, install.

Inputs are checked before the first byte is written, and files are written to the store's staging folder until the model
is complete. Only measurements outlive a stopped run, for the next one.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from convert.checkpoint.folder import HfCheckpoint
from convert.checkpoint.source import Checkpoint, GgufCheckpoint, open_checkpoint
from convert.lora.fit import Fitted, fit
from convert.lora.gguf_adapter import FULL_PRECISION, check_appliable, plan_adapter
from convert.planning.inputs import KEEP, Inputs, gather
from convert.planning.plan import (
    ConversionPlan,
    base_of,
    byte_counter,
    kept_layout,
    layout_of,
    plan_conversion,
    write_f16,
    write_kept,
)
from convert.planning.request import ConvertRequest
from convert.planning.speech import check_speakable, speech_folders, speech_of
from convert.proof.proof import Proof
from convert.proof.runs import check_kind, verify_adapter, verify_runs
from convert.quantize.imatrix import IMATRIX_FILE
from convert.quantize.quantize import HALF_PRECISION, disk_need, quantize, spec_named
from convert.selection.by_examples import Built, choose_by_examples
from convert.selection.choice import shared_grid, undo_cause
from convert.selection.confidence import calibration_of
from convert.tokenizer.chat_template import TEMPLATE_FIELD, ChatFormat
from models.card.calibration import RELIABILITY_FILE, render_reliability
from models.card.card import render_card
from models.card.plot import PLOT_FILE, render_plot
from models.card.training import CURVE_FILE, render_curve
from models.common.console import Reporter
from models.common.files import check_free, discard, sha256_file, sync, write_atomic
from models.common.machine import give_back_freed
from models.gguf.fields import Field
from models.gguf.header import Header, read_header
from models.manifest import MANIFEST_FILE, Artefact, Conversion, dump_manifest
from models.quality import Candidate, Quality, read_quality, write_quality
from models.store.store import Store, StoredModel

from .gguf_writer import check_written, write_gguf

MEASUREMENTS = "measured"
"""Folder of the store that keeps measurements of candidates for a later run."""


Admit = Callable[[StoredModel], None]
"""Judges a finished model before it is installed; raises to keep what is installed under its name."""


def convert(request: ConvertRequest, store: Store, report: Reporter, admit: Admit | None = None) -> StoredModel:
    """Make the model the request describes and install it. One that `admit` has judged may replace another.

    Raises ConvertError for the request, the adapter or the weights, ModelError for the source file and the store. An
    error or an interrupt at any time leaves the installed models as they were.
    """
    inputs = gather(request, store, report)
    if request.hot:
        _make_adapter(inputs, request, store, report)
    else:
        _make_model(inputs, request, store, report, admit)
    return store.get(inputs.manifest.name)


@dataclass(frozen=True)
class _Build:
    """The state of one conversion: the checkpoint, the plan, and the folder that files are written to."""

    checkpoint: Checkpoint
    plan: ConversionPlan
    inputs: Inputs
    workdir: Path
    report: Reporter

    def file(self, quantization: str) -> Path:
        """The path of the model's file in that quantization."""
        return self.workdir / _file_name(self.inputs, quantization)


def _make_model(inputs: Inputs, request: ConvertRequest, store: Store, report: Reporter, admit: Admit | None) -> None:
    with ExitStack() as stack:
        folders = speech_folders(inputs.origin.folder, inputs.adapter.folder if inputs.adapter is not None else None)
        proof = Proof(folders.tokenizer, folders.template) if folders.tokenizer is not None else None
        if proof is not None:
            stack.callback(proof.close)
        checkpoint = stack.enter_context(closing(open_checkpoint(inputs.origin.path)))
        read_back: set[str] = set()
        replaces = request.replace or admit is not None
        staging = store.staging(inputs.manifest.name, replace=replaces, read_back=read_back)
        folder = stack.enter_context(staging)
        if proof is not None:
            stack.callback(proof.close)  # before the staging folder is removed: the proof reads from it
        plan = plan_conversion(checkpoint, inputs)
        check_kind(checkpoint.header)
        _warn(checkpoint, plan.chat, plan.fitted, inputs, report)
        build = _Build(checkpoint, plan, inputs, folder / "work", report)
        build.workdir.mkdir()
        if proof is not None:
            _begin_proof(proof, build)
        check_free(folder, _disk_need(build))
        if inputs.quantization == KEEP:
            f16, sha256 = _write_kept(build, proof)
            quality, chosen = None, f16
        else:
            f16, sha256 = _write_f16(build, proof)
            quality, chosen = _choose(build, f16, sha256, store.home / MEASUREMENTS)
        hashes = {f16: sha256}
        report.stage("verify")
        give_back_freed()  # a child process loads the model next
        verify_runs(chosen, plan.chat, partial(_read_back, chosen, hashes))
        if inputs.recipe_quality is not None:
            quality = _recipe_quality(inputs.recipe_quality, hashes[chosen])
        kept = [chosen, f16] if request.keep_f16 and f16 != chosen else [chosen]
        n_in_matrix = quality.calibration_examples if quality is not None else 0
        calibration = calibration_of(chosen, n_in_matrix, inputs, store.home / MEASUREMENTS, report)
        if calibration is not None:
            described = inputs.manifest.model_copy(update={"calibration": calibration})
            inputs = replace(inputs, manifest=described)
        read_back |= {path.name for path in kept}
        if (imatrix := _imatrix_to_keep(build, quality)) is not None:
            shutil.copyfile(imatrix, folder / IMATRIX_FILE)
        _describe(
            folder,
            {path.rename(folder / path.name): hashes[path] for path in kept},
            inputs,
            quality,
            plan,
            chats=TEMPLATE_FIELD in plan.header.fields,
        )
        discard(build.workdir)
        if admit is not None:
            admit(store.resolve(folder))


def _make_adapter(inputs: Inputs, request: ConvertRequest, store: Store, report: Reporter) -> None:
    assert inputs.adapter is not None, "gather refuses --hot without an adapter"
    with store.staging(inputs.manifest.name, replace=request.replace) as folder:
        base = inputs.origin.path
        header = read_header(base)
        fitted = fit(inputs.adapter, header)
        check_appliable(inputs.adapter, fitted)
        speech = speech_of(header, None, inputs.adapter.folder)
        check_speakable(speech, inputs.adapter.folder, inputs.manifest.labels)
        chat, fitted = speech.chat, replace(fitted, warnings=(*fitted.warnings, *speech.warnings))
        plan = plan_adapter(header, fitted.loras, chat, inputs.manifest.name, inputs.manifest.licence)
        _warn(None, chat, fitted, inputs, report)
        check_free(folder, plan.layout.file_bytes)
        report.stage(f"write {len(fitted.loras)} pairs of matrices", plan.layout.data_bytes)
        target = folder / _file_name(inputs, FULL_PRECISION)
        sha256 = write_gguf(target, plan.layout, plan.rows, byte_counter(plan.layout, report))
        report.stage("verify")
        verify_adapter(base, target, speech.ends, is_zero=inputs.adapter.is_zero)
        _prove_hot(header, chat, inputs, folder, report)
        chats = chat.template is not None or TEMPLATE_FIELD in header.fields
        _describe(folder, {target: sha256}, inputs, None, None, chats=chats)
        if inputs.examples is not None:
            report.note(
                "the adapter is left as it is: from the examples come task, labels and prompt, nothing is measured"
            )


def _prove_hot(header: Header, chat: ChatFormat, inputs: Inputs, folder: Path, report: Reporter) -> None:
    """Compare the base's tokenizer with the one in the adapter's folder, if any, under the adapter's template."""
    assert inputs.adapter is not None, "gather refuses --hot without an adapter"
    folders = speech_folders(None, inputs.adapter.folder)
    if folders.tokenizer is None:
        return
    fields = {**header.fields, **({} if chat.template is None else {TEMPLATE_FIELD: Field.string(chat.template)})}
    workdir = folder / "work"
    workdir.mkdir()
    with closing(Proof(folders.tokenizer, folders.template)) as proof:
        examples = inputs.examples.records if inputs.examples is not None else ()
        proof.begin(replace(header, fields=fields), examples, workdir)
        proof.end(report)
    discard(workdir)


def _begin_proof(proof: Proof, build: _Build) -> None:
    """Compare tokenizer and template as they are written, before the vocabulary is cut."""
    examples = build.inputs.examples
    proof.begin(build.plan.header, examples.records if examples is not None else (), build.workdir)


def _disk_need(build: _Build) -> int:
    """Bytes of the files that are written in any case; the ladder checks the disk again for its candidates."""
    plan, inputs = build.plan, build.inputs
    if inputs.quantization == KEEP:
        return kept_layout(plan)[1].file_bytes
    specs = [spec_named(inputs.quantization or HALF_PRECISION, imatrix=False)]
    n_f16_files = 1 if inputs.examples is None else 1 + (plan.trim is not None) + (inputs.adapter is not None)
    return disk_need(plan.layout.file_bytes, plan.layout.tensors, specs) * n_f16_files


def _write_f16(build: _Build, proof: Proof | None) -> tuple[Path, str]:
    """Write the F16 file, and stop as soon as the proof has failed. Returns its path and sha256."""
    plan, report = build.plan, build.report
    changes = plan.fitted.changes
    trimmed = "" if plan.trim is None else f", {len(plan.trim.kept)} of {plan.trim.n_before} tokens"
    stage = f"merge {len(changes)} tensors, write F16{trimmed}" if changes else f"write F16{trimmed}"
    f16 = build.file(HALF_PRECISION)
    watch = (lambda: None) if proof is None else partial(proof.check, report)
    sha256 = write_f16(plan.checkpoint, plan.layout, f16, stage, report, watch)
    if proof is not None:
        proof.end(report)
    return f16, sha256


def _write_kept(build: _Build, proof: Proof | None) -> tuple[Path, str]:
    """Write the file with the source's weights as they are. Returns its path and sha256."""
    assert isinstance(build.checkpoint, GgufCheckpoint), "gather refuses to keep the weights of a folder"
    quantization, layout = kept_layout(build.plan)
    target = build.file(quantization)
    watch = (lambda: None) if proof is None else partial(proof.check, build.report)
    sha256 = write_kept(build.checkpoint, layout, target, build.report, watch)
    if proof is not None:
        proof.end(build.report)
    if build.inputs.examples is not None:
        build.report.note(
            "the weights are kept: from the examples come task, labels and prompt, and how sure it is of the labels"
        )
    return target, sha256


def _choose(build: _Build, f16: Path, sha256: str, results: Path) -> tuple[Quality | None, Path]:
    """Choose the file to install: by the examples, if any, or by the request. Returns the report, if any, and the file.

    A file that others are made from is read back here; the installed file is read back while it is verified.
    """
    inputs = build.inputs
    if inputs.examples is not None:
        check_written(f16, sha256)
        built = Built(f16, _write_untrimmed(build), _write_base(build))
        return choose_by_examples(built, build.plan, inputs, results, build.report)
    chosen = f16
    if inputs.quantization != HALF_PRECISION:
        check_written(f16, sha256)
        chosen = _quantized(build, f16)
    _warn_same_grid(build, chosen)
    return None, chosen


def _write_untrimmed(build: _Build) -> Path | None:
    """Write the F16 file with the full vocabulary; None if the vocabulary is not cut."""
    plan = build.plan
    if plan.trim is None:
        return None
    target = build.workdir / "untrimmed.gguf"
    write_f16(plan.untrimmed, layout_of(plan.header), target, "write F16 before trimming", build.report)
    return target


def _write_base(build: _Build) -> Path | None:
    """Write the model before its fine-tuning; None without an adapter.

    A GGUF source with the same vocabulary is used unchanged.
    """
    inputs, plan = build.inputs, build.plan
    if inputs.adapter is None:
        return None
    if inputs.origin.path.is_file() and plan.trim is None:
        return inputs.origin.path
    target = build.workdir / "base.gguf"
    base, layout = base_of(build.checkpoint, plan)
    write_f16(base, layout, target, "write the base", build.report)
    return target


def _quantized(build: _Build, f16: Path) -> Path:
    inputs, report = build.inputs, build.report
    quantization = inputs.quantization
    assert quantization is not None, "gather leaves the quantization open only with examples"
    report.stage(f"quantize to {quantization}")
    target = build.file(quantization)
    spec = spec_named(quantization, imatrix=inputs.imatrix is not None)
    result = quantize(f16, target, spec, inputs.imatrix, report.advance)
    if spec.overrides and result.fallbacks:
        report.warn(
            f"{result.fallbacks} of the matrices have rows that do not fit the types of {quantization}: llama.cpp "
            "stored them in wider ones"
        )
    return target


def _read_back(file: Path, hashes: dict[Path, str]) -> None:
    """Hash the file to be installed from disk, compare with its known hash if there is one, and flush it to disk."""
    if file in hashes:
        check_written(file, hashes[file])
    else:
        hashes[file] = sha256_file(file)
    sync(file)


def _recipe_quality(folder: Path, sha256: str) -> Quality | None:
    """The recipe's own measurements; None if they were made on another file."""
    quality = read_quality(folder)
    return quality if _chosen_candidate(quality).sha256 == sha256 else None


def _imatrix_to_keep(build: _Build, quality: Quality | None) -> Path | None:
    """The importance matrix that the file was quantized with, if any; None for a recipe's build: the recipe has it."""
    inputs = build.inputs
    if inputs.examples is None or quality is None:
        return inputs.imatrix if inputs.manifest.conversion is None else None
    return build.workdir / IMATRIX_FILE if _chosen_candidate(quality).imatrix else None


def _chosen_candidate(quality: Quality) -> Candidate:
    return next(candidate for candidate in quality.candidates if candidate.name == quality.chosen)


def _warn(checkpoint: Checkpoint | None, chat: ChatFormat, fitted: Fitted, inputs: Inputs, report: Reporter) -> None:
    of_folder = checkpoint.warnings if isinstance(checkpoint, HfCheckpoint) else ()
    for warning in dict.fromkeys((*of_folder, *chat.warnings, *fitted.warnings)):
        report.warn(warning)
    if inputs.adapter is not None and inputs.adapter.is_zero:
        report.warn(f"the adapter {str(inputs.adapter.folder)!r} is all zero: it was never trained and changes nothing")


def _warn_same_grid(build: _Build, chosen: Path) -> None:
    """Warn if merged weights are rounded to the grid of a quantized base, which can undo the fine-tune."""
    tuned = build.plan.fitted.loras
    if tuned and (grid := shared_grid(build.plan.base_header, read_header(chosen), tuned)):
        build.report.warn(
            f"{undo_cause(grid, len(tuned))}: THE FINE-TUNE MAY BE ROUNDED AWAY. Use --quant Q8_0 or F16, or a base in "
            "full precision, and measure on your own examples (--examples)"
        )


def _file_name(inputs: Inputs, quantization: str) -> str:
    return f"{inputs.manifest.name}-{quantization}.gguf"


def _describe(
    folder: Path,
    files: Mapping[Path, str],
    inputs: Inputs,
    quality: Quality | None,
    plan: ConversionPlan | None,
    *,
    chats: bool,
) -> None:
    """Write manifest, report and card for `files` (path -> sha256, in the order of preference)."""
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
    if manifest.training is not None and (curve := render_curve(manifest.training)) is not None:
        write_atomic(folder / CURVE_FILE, curve)
    if manifest.calibration is not None and (drawn := render_reliability(manifest.calibration)) is not None:
        write_atomic(folder / RELIABILITY_FILE, drawn)
    write_atomic(folder / "README.md", render_card(manifest, quality, chats=chats))


def _artefact(file: Path, sha256: str, inputs: Inputs) -> Artefact:
    quantization = file.stem.removeprefix(f"{inputs.manifest.name}-")
    return Artefact(file=file.name, quantization=quantization, size_bytes=file.stat().st_size, sha256=sha256)
