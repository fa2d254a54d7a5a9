"""The terminal report in 80 columns: the verdict, then tables and notes, all computed from a run's file.

Replayed and assumed figures are marked as such everywhere.
"""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.comparison.figures import ArmAccuracy, ArmFigures, LevelFigures, Spread, Statistics
from benchmarks.comparison.scoring import OTHER, ClassificationScore, WritingScore
from benchmarks.comparison.task_scores import ExtractionScore, RougeScore, TaskScore
from benchmarks.cost import Bill, Offer
from benchmarks.record import Arm, BenchRun
from models.common.console import page
from models.common.stats import Interval

NEVER = "never"
LATENCY_COLUMNS = ("users", "TTFT p50", "p90", "E2E p50", "p90")
RATE_COLUMNS = ("users", "n", "errors", "TPOT p50", "p90", "req/s", "tok/s out")


def render(run: BenchRun, statistics: Statistics, bill: Bill | None, console: Console) -> None:
    """Print the verdict, the machine and workload, latency, cost, notes and warnings."""
    for line in verdict_lines(run, statistics, bill):
        console.print(Text(line))
    for warning in run.warnings:
        console.print(Text(f"warning: {warning}"))
    console.print()
    for line in _heading(run):
        console.print(Text(line))
    for table in speed_tables(statistics):
        console.print()
        console.print(table)
    if bill is not None:
        console.print()
        console.print(cost_table(bill))
        for line in cost_lines(bill):
            console.print(Text(f"- {line}"))
    console.print()
    for line in notes(run, statistics):
        console.print(Text(f"- {line}"))


def verdict_lines(run: BenchRun, statistics: Statistics, bill: Bill | None) -> Iterator[str]:
    """The findings of the run in sentences: cost, time to an answer, accuracy."""
    if bill is not None:
        yield from _verdict(bill)
    for users in run.workload.concurrency[:1]:
        times = [
            f"{arm.name} {level.e2e.p50_ms:.0f} ms"
            for arm in statistics.arms
            for level in arm.levels
            if level.concurrency == users and level.e2e.p50_ms is not None
        ]
        if times:
            yield f"median time to a whole answer at {users} user{'s' * (users > 1)}: {', '.join(times)}"
    yield from accuracy_lines(statistics)


def render_score(model: str, score: TaskScore | WritingScore, console: Console | None = None) -> None:
    """Print the measures with their intervals; for labels, also one row each."""
    console = console or page()
    if not isinstance(score, ClassificationScore):
        console.print(Text(f"{model}: {', '.join(_measures(score))}"))
        return
    accuracy, macro = score.accuracy, score.macro_f1
    console.print(
        Text(
            f"{model}: accuracy {_shown(accuracy)} ({score.correct} of {score.total}; Wilson 95 %), "
            f"macro-F1 {_shown(macro)} (bootstrap 95 %)"
        )
    )
    table = _table("By label", "label")
    for name in ("n", "precision", "recall", "F1", "mostly taken for"):
        table.add_column(name, justify="right")
    for i, row in enumerate(score.classes):
        figures = (f"{row.precision:.3f}", f"{row.recall:.3f}", f"{row.f1:.3f}")
        table.add_row(row.label, str(row.support), *figures, _confused(score, i))
    console.print(table)


def _measures(score: ExtractionScore | RougeScore | WritingScore) -> Iterator[str]:
    exact = f"{_shown(score.exact)} ({score.correct} of {score.total}; Wilson 95 %)"
    if isinstance(score, ExtractionScore):
        yield f"valid {_shown(score.valid)} ({score.n_valid} of {score.total}; Wilson 95 %)"
        yield f"field F1 {_shown(score.field_f1)} (bootstrap 95 %), all fields right {exact}"
        return
    name, value = ("chrF", score.chrf) if isinstance(score, WritingScore) else ("ROUGE-L", score.rouge_l)
    yield f"{name} {_shown(value)} (mean of {score.total} texts, 1 is the same; bootstrap 95 %)"
    yield f"exactly the same {exact}"


def _shown(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def speed_tables(statistics: Statistics) -> tuple[Table, Table]:
    """Latency and throughput, a row per arm and concurrency: p50 with its 95 % interval, p90 from 64 requests on."""
    latency, rates = _table("Latency, ms", "arm"), _table("Throughput; TPOT in ms", "arm")
    for table, columns in ((latency, LATENCY_COLUMNS), (rates, RATE_COLUMNS)):
        for name in columns:
            table.add_column(name, justify="right")
    for figures in statistics.arms:
        for place, level in enumerate(figures.levels):
            name = "" if place else figures.name
            latency.add_row(name, *_latency_cells(level))
            rates.add_row(name, *_rate_cells(level))
    return latency, rates


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def accuracy_lines(statistics: Statistics) -> Iterator[str]:
    """The accuracy of each arm that measures it, and the paired comparisons."""
    for arm in statistics.arms:
        if arm.chrf is not None:
            yield f"chrF of the written texts, {arm.name}: {arm.chrf:.3f} (mean; 1 is the same text)"
        else:
            yield f"accuracy, {arm.name}: {format_accuracy(arm.accuracy) if arm.accuracy else 'not measured'}"
    for pair in statistics.comparisons:
        yield (
            f"{pair.first} minus {pair.second}: {pair.difference:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}] "
            f"(paired, Newcombe 95 %; exact McNemar p = {pair.p_value:.2g}; "
            f"only first right {pair.only_first}, only second {pair.only_second})"
        )


def format_accuracy(accuracy: ArmAccuracy) -> str:
    """`0.836 [0.790, 0.874] (209 of 250; Wilson 95 %)`."""
    return (
        f"{accuracy.share:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] "
        f"({accuracy.correct} of {accuracy.total}; Wilson 95 %)"
    )


def cost_table(bill: Bill) -> Table:
    """Dollars per 1,000 requests of each hosted model, and the requests until the fine-tune breaks even."""
    title = f"Few-shot prompt, hosted: $ per 1,000 requests, priced {bill.priced_on}; break-even in requests (assumed)"
    table = _table(title)
    table.add_column("model", no_wrap=True)
    for name in ("standard", "cached", "batch", "break-even standard", "break-even cached", "break-even batch"):
        table.add_column(name, justify="right")
    rows: dict[str, dict[str, Offer]] = {}
    for offer in bill.offers:
        rows.setdefault(offer.model, {})[offer.variant] = offer
    for model, offers in rows.items():
        variants = [offers[name] for name in ("standard", "cached", "batch")]
        table.add_row(model, *(f"{o.cost_per_1000:.4f}" for o in variants), *(_requests(o) for o in variants))
    return table


def cost_lines(bill: Bill) -> Iterator[str]:
    """The basis of the costs, and the cheaper side at the assumed volume."""
    given, tokens = bill.assumptions, bill.tokens
    yield (
        f"local fine-tune: ${bill.local_cost_per_1000:.4f} per 1,000 requests at "
        f"{bill.local_seconds_per_request:.3f} s of machine time each; "
        f"assumed: {given.power_watts:g} W, ${given.price_kwh:g}/kWh, machine "
        f"${given.machine_price:g} over {given.machine_years:g} years, busy seconds only; "
        f"once ${given.finetune_total:g} (${given.finetune_price:g} and {given.finetune_hours:g} h at "
        f"${given.hour_price:g})"
    )
    yield (
        f"hosted prompt: {tokens.prompt:.0f} tokens in ({tokens.shared:.0f} of them the same every time), "
        f"{tokens.completion:.1f} out, counted by {bill.tokens_from}; other tokenizers count differently. 'cached' "
        "takes every shared token as a cache hit: providers have a minimum length and some bill cache writes. "
        "'batch' answers within hours, not at once, and is priced without cache hits."
    )
    yield f"prices of {bill.priced_on} from {' and '.join(sorted({offer.source for offer in bill.offers}))}"
    yield "a prompt without examples costs even less; prices say nothing about a hosted model's accuracy with either"
    for line in bill.disagreements:
        yield f"prices disagree: {line}"


def notes(run: BenchRun, statistics: Statistics) -> Iterator[str]:
    """Notes on the tables: sources, definitions, and why figures are absent."""
    for arm, figures in zip(run.arms, statistics.arms, strict=True):
        yield f"{_arm_name(arm)}; {arm.source}{_start(arm)}{_cached(figures)}"
        if arm.kind == "replayed":
            yield (
                f"{arm.name}: whole-call times of another prompt, so TTFT, TPOT and accuracy are not measured; "
                "the shape under the recorded median is assumed log-normal"
            )
    yield "TTFT and E2E count from the scheduled send; TPOT = (finish − first token) / (tokens − 1); [ ] is 95 %"


def _heading(run: BenchRun) -> Iterator[str]:
    machine, work = run.machine, run.workload
    memory = f", {machine.memory_bytes / 2**30:.0f} GiB" if machine.memory_bytes else ""
    yield f"{machine.cpu}, {machine.logical_cores} logical cores{memory}; {machine.system}; {run.started_at}"
    yield (
        f"{work.requests_per_level} requests per arm and level (one repetition), closed loop at "
        f"{', '.join(map(str, work.concurrency))}; {work.available} examples in {work.examples}, none used twice"
    )


def _arm_name(arm: Arm) -> str:
    details = ", ".join(part for part in (arm.quantization, arm.prompt) if part)
    return f"{arm.name}: {arm.model} ({details})"


def _latency_cells(level: LevelFigures) -> Iterable[str]:
    e2e = (_p50(level.e2e), _p90(level.e2e))
    return (str(level.concurrency), _p50(level.ttft), _p90(level.ttft), *e2e)


def _rate_cells(level: LevelFigures) -> Iterable[str]:
    rate = level.completion_tokens_per_s
    return (
        *(str(level.concurrency), str(level.requests), str(level.errors), _p50(level.tpot), _p90(level.tpot)),
        f"{level.requests_per_s:.2f}",
        "–" if rate is None else f"{rate:.1f}",
    )


def _p50(spread: Spread | None) -> str:
    if spread is None or spread.p50_ms is None:
        return "–"
    if spread.p50_low_ms is None or spread.p50_high_ms is None:
        return f"{spread.p50_ms:.0f} [n<6]"
    return f"{spread.p50_ms:.0f} [{spread.p50_low_ms:.0f}, {spread.p50_high_ms:.0f}]"


def _p90(spread: Spread | None) -> str:
    if spread is None or spread.n == 0:
        return "–"
    return "n<64" if spread.p90_ms is None else f"{spread.p90_ms:.0f}"


def _requests(offer: Offer) -> str:
    return NEVER if offer.break_even_requests is None else f"{offer.break_even_requests:,.0f}"


def _verdict(bill: Bill) -> Iterator[str]:
    volume = bill.assumptions.monthly_requests
    months = [offer.break_even_months for offer in bill.offers]
    slow = sum(month is None or month > 12 for month in months)
    cheapest = min(bill.offers, key=lambda offer: offer.cost_per_1000, default=None)
    if cheapest is None:
        return
    yield (
        f"at {volume:,.0f} requests a month (assumed) the prompt is cheaper than the fine-tune for a year or more with "
        f"{slow} of {len(months)} offers; the cheapest, {cheapest.model} ({cheapest.variant}), costs "
        f"${cheapest.cost_per_1000 * volume / 1000:.2f} a month and breaks even after {_months(cheapest)}"
    )
    if 2 * slow > len(months):
        yield (
            "on cost alone, take the prompt: the fine-tune's reasons are then privacy, latency, accuracy, "
            "or a larger volume"
        )


def _months(offer: Offer) -> str:
    months = offer.break_even_months
    if months is None:
        return NEVER
    return f"{months:,.1f} months" if months < 24 else f"{months / 12:,.0f} years"


def _start(arm: Arm) -> str:
    return f"; ready after {arm.start_s:.1f} s" if arm.start_s else ""


def _cached(figures: ArmFigures) -> str:
    shares = [level.cached_share for level in figures.levels if level.cached_share is not None]
    return f"; {100 * sum(shares) / len(shares):.0f} % of prompt tokens were shared prefix" if shares else ""


def _confused(score: ClassificationScore, index: int) -> str:
    others = [(n, i) for i, n in enumerate(score.confusion[index]) if i != index and n]
    if not others:
        return "–"
    count, column = max(others)
    return f"{(*score.labels, OTHER)[column]} ({count})"
