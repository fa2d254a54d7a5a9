"""The choice by the user's own examples: an importance matrix from some of them, the ladder measured on the others."""

import shutil
from pathlib import Path

from convert.measure.examples import prompts_of, texts_of
from convert.measure.tasks import tasks_of
from convert.planning.inputs import Inputs
from convert.planning.plan import ConversionPlan
from convert.quantize.imatrix import IMATRIX_FILE, collect
from convert.quantize.layouts import ladder
from convert.quantize.quantize import spec_named
from convert.trim.plan import tokenizer_of
from convert.trim.source import coverage, greedy_agreement
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.common.files import sha256_file
from models.gguf.header import read_header
from models.quality import Quality, Trim
from runtime.llama.model import LoadOptions, load, load_tokenizer

from .cache import digest
from .ladder import LadderInputs, Provenance, run_ladder

# Sixteen of llama-imatrix's own chunks. Every operation of a step is looked at one by one, which takes many times as
# long as computing it, the output matrix over a large vocabulary above all.
MAX_CALIBRATION_TOKENS = 8192
# The agreement is answered one prompt at a time, with both models in memory.
MAX_AGREEMENT_PROMPTS = 48


def choose_by_examples(
    f16: Path,
    base: Path | None,
    untrimmed: Path | None,
    plan: ConversionPlan,
    inputs: Inputs,
    results: Path,
    report: Reporter,
) -> tuple[Quality, Path]:
    """Measure the ladder of `f16` and pick: the report, and the chosen file, which lies beside `f16`.

    `base` is the model before its fine-tuning, `untrimmed` the F16 file before its vocabulary was trimmed. What
    takes long is kept in `results` for the next run. Raises BadExamples, and as `run_ladder` does.
    """
    examples = inputs.examples
    assert examples is not None, "without examples nothing is measured"
    split, prompt_template = examples.split, inputs.manifest.prompt.template
    tasks = tasks_of(f16, split.held_out, examples.work, examples.labels, prompt_template)
    sequences = _calibration(f16, split.calibration, prompt_template)
    imatrix = _importance(f16, sequences, results, report)
    specs = ladder(read_header(f16), examples.work, imatrix=True)
    wanted = inputs.quantization
    if wanted is not None and wanted not in {spec.name for spec in specs}:
        specs = (*specs, spec_named(wanted, imatrix=True))
    trim = _trim_report(f16, untrimmed, plan, split.held_out, prompt_template, report)
    return run_ladder(
        LadderInputs(
            f16=f16,
            stem=inputs.manifest.name,
            tasks=tasks,
            specs=specs,
            imatrix=imatrix,
            base=base,
            tuned=tuple(plan.fitted.changes),
            base_header=plan.base_header,
            budget=examples.budget,
            wanted=wanted,
        ),
        Provenance(examples.path.name, examples.sha256, len(sequences), trim),
        f16.parent,
        report,
        results=results,
    )


def _calibration(f16: Path, records: tuple[ChatRecord, ...], prompt_template: str) -> list[list[int]]:
    """The token ids of whole examples, as many as reach MAX_CALIBRATION_TOKENS."""
    tokenizer = load_tokenizer(f16)
    taken, n_tokens = [], 0
    for text in texts_of(read_header(f16), tokenizer, records, prompt_template):
        if n_tokens >= MAX_CALIBRATION_TOKENS:
            break
        taken.append(tokenizer.encode(text, add_special=False, parse_special=True))
        n_tokens += len(taken[-1])
    return taken


def _importance(f16: Path, sequences: list[list[int]], results: Path, report: Reporter) -> Path:
    """The importance matrix of the calibration examples; collected anew only when these or the model are others."""
    kept = results / f"imatrix-{digest([sha256_file(f16), sequences])[:32]}.gguf"
    if not kept.is_file():
        report.stage(f"collect the importance matrix from {len(sequences)} examples")
        results.mkdir(parents=True, exist_ok=True)
        collect(f16, sequences, kept, report.advance, output=True)
    return Path(shutil.copyfile(kept, f16.with_name(IMATRIX_FILE)))


def _trim_report(
    f16: Path,
    untrimmed: Path | None,
    plan: ConversionPlan,
    records: tuple[ChatRecord, ...],
    prompt_template: str,
    report: Reporter,
) -> Trim | None:
    """What the cut vocabulary covers of the held-out examples, and how often it answers alike."""
    if plan.trim is None or untrimmed is None:
        return None
    tokenizer = tokenizer_of(plan.header)
    found = coverage(plan.header, plan.trim, texts_of(plan.header, tokenizer, records, prompt_template))
    prompts = prompts_of(plan.header, tokenizer, records, prompt_template)
    report.stage("compare answers before and after trimming the vocabulary")
    options = LoadOptions(n_ctx=4096, n_batch=512, n_seq_max=1)
    before = load(untrimmed, options)
    try:
        after = load(f16, options)
        try:
            agreement = greedy_agreement(before, after, prompts[:MAX_AGREEMENT_PROMPTS], report.advance)
        finally:
            after.close()
    finally:
        before.close()
    return found.report(plan.trim, agreement)
