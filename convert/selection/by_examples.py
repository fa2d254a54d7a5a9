"""The choice by the user's own examples: some calibrate the importance matrix, the others measure the ladder."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from convert.measure.answers import metric_for
from convert.measure.examples import prompts_of, texts_of
from convert.measure.tasks import tasks_of
from convert.planning.inputs import Inputs
from convert.planning.plan import ConversionPlan
from convert.quantize.imatrix import IMATRIX_FILE, collect
from convert.quantize.layouts import ladder
from convert.quantize.quantize import spec_named
from convert.trim.plan import coverage, greedy_agreement, tokenizer_of
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.common.files import sha256_file
from models.gguf.header import read_header
from models.manifest import Prompt
from models.quality import LossBudget, Quality, Trim
from runtime.llama.interface import LoadOptions
from runtime.llama.model import load, load_tokenizer

from .cache import digest
from .ladder import LadderInputs, Provenance, run_ladder

# Sixteen of llama-imatrix's own chunks. Collecting inspects every operation of a step, which takes many times as long
# as computing it, above all for the output matrix over a large vocabulary.
MAX_CALIBRATION_TOKENS = 8192
# The agreement is measured one prompt at a time, with both models in memory.
MAX_AGREEMENT_PROMPTS = 48


@dataclass(frozen=True)
class Built:
    """The files that candidates are made from and compared with.

    `f16` is the fine-tune; `untrimmed` the same before its vocabulary was trimmed (None: it is not trimmed); `base` the
    model before its fine-tuning (None: nothing was merged).
    """

    f16: Path
    untrimmed: Path | None
    base: Path | None


def choose_by_examples(
    files: Built, plan: ConversionPlan, inputs: Inputs, results: Path, report: Reporter
) -> tuple[Quality, Path]:
    """Measure the ladder of `files.f16` and choose. Returns the report and the chosen file, in the same folder.

    Slow results are kept in `results` for the next run. Raises BadExamples, and as `run_ladder` does.
    """
    examples, f16 = inputs.examples, files.f16
    assert examples is not None, "the caller has checked"
    split, prompt = examples.split, inputs.manifest.prompt
    tasks = tasks_of(f16, split.held_out, examples.work, examples.labels, prompt)
    report.note(sample_power(len(tasks.tasks), examples.budget, metric_for(examples.work)))
    sequences = _calibration(f16, split.calibration, prompt)
    imatrix = _importance(f16, sequences, results, report)
    specs = ladder(read_header(f16), examples.work, imatrix=True)
    forced = inputs.quantization
    if forced is not None and forced not in {spec.name for spec in specs}:
        specs = (*specs, spec_named(forced, imatrix=True))
    trim = _trim_report(files, plan, split.held_out, prompt, report)
    return run_ladder(
        LadderInputs(
            f16=f16,
            stem=inputs.manifest.name,
            tasks=tasks,
            specs=specs,
            imatrix=imatrix,
            base=files.base,
            tuned=tuple(plan.fitted.changes),
            base_header=plan.base_header,
            budget=examples.budget,
            forced=forced,
        ),
        Provenance(examples.path.name, examples.sha256, len(sequences), trim),
        f16.parent,
        report,
        results=results,
    )


def sample_power(n_examples: int, budget: LossBudget, metric: str | None = None) -> str:
    """State in a sentence how much of the budget this number of held-out examples can show.

    With no change among n, the share that changes is below 1 − 0.05^(1/n) at 95 %. `metric`: the score of written
    answers, of which nothing is known before it is measured.
    """
    if metric is not None:
        return (
            f"{n_examples} examples are held out to measure with: a file is refused if its mean {metric} is lower than "
            "F16's at 95 %; the model's card has the interval of each difference, which more examples would narrow"
        )
    allowed = int(budget.flips * n_examples)
    unseen = 1 - 0.05 ** (1 / n_examples)
    let = f"{allowed} of them" if allowed else "none of them"
    more = "" if unseen <= budget.flips else "; more examples would tell quantizations apart better"
    return (
        f"{n_examples} examples are held out to measure with: a budget of {budget.flips:.0%} lets {let} change its "
        f"answer, and if none does, up to {unseen:.1%} of all answers may still change (95 %){more}"
    )


def _calibration(f16: Path, records: tuple[ChatRecord, ...], prompt: Prompt) -> list[list[int]]:
    """The token ids of as many complete examples as reach MAX_CALIBRATION_TOKENS."""
    tokenizer = load_tokenizer(f16)
    sequences, n_tokens = [], 0
    for text in texts_of(read_header(f16), tokenizer, records, prompt):
        if n_tokens >= MAX_CALIBRATION_TOKENS:
            break
        sequences.append(tokenizer.encode(text, add_special=False, parse_special=True))
        n_tokens += len(sequences[-1])
    return sequences


def _importance(f16: Path, sequences: list[list[int]], results: Path, report: Reporter) -> Path:
    """The importance matrix of `sequences`, collected only if `results` has none for them and this model."""
    kept = results / f"imatrix-{digest([sha256_file(f16), sequences])[:32]}.gguf"
    if not kept.is_file():
        report.stage(f"collect the importance matrix from {len(sequences)} examples")
        results.mkdir(parents=True, exist_ok=True)
        collect(f16, sequences, kept, report.advance, output=True)
    return Path(shutil.copyfile(kept, f16.with_name(IMATRIX_FILE)))


def _trim_report(
    files: Built, plan: ConversionPlan, records: tuple[ChatRecord, ...], prompt: Prompt, report: Reporter
) -> Trim | None:
    """The share of the held-out examples that the trimmed vocabulary covers, and how often both models agree."""
    if plan.trim is None or files.untrimmed is None:
        return None
    tokenizer = tokenizer_of(plan.header)
    covered = coverage(plan.header, plan.trim, texts_of(plan.header, tokenizer, records, prompt))
    prompts = prompts_of(plan.header, tokenizer, records, prompt)
    report.stage("compare answers before and after trimming the vocabulary")
    options = LoadOptions(n_ctx=4096, n_batch=512, n_seq_max=1)
    with ExitStack() as models:
        before = load(files.untrimmed, options)
        models.callback(before.close)
        after = load(files.f16, options)
        models.callback(after.close)
        agreement = greedy_agreement(before, after, prompts[:MAX_AGREEMENT_PROMPTS], report.advance)
    return covered.report(plan.trim, agreement)
