"""`deskside bench peers` and its report: tables computed from the run's file alone."""

import json
import sys
from collections.abc import Iterator, Sequence

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.common.console import page, show_progress
from models.common.machine import mebibytes, vector_kind
from models.common.options import JsonOption, ReportOption, with_options
from models.errors import SOME_FAILED

from .aims import PeerAim, best_peer, judge, profile
from .figures import OfflineRow, OnlineRow, PeerFigures, PromptRow, TalkRow, figures_of, ratio, sooner
from .plan import compare_peers
from .record import PeerRun, PeerSettings, load_peer_run
from .tasks import DESKSIDE, LLAMA_SERVER

RATE_COLUMNS = ("n", "errors", "req/s [range]", "ours / it [range]")
LATENCY_COLUMNS = ("TTFT p50", "p95", "E2E p50", "right")


@with_options(settings=PeerSettings)
def peers_command(settings: PeerSettings, as_json: JsonOption = False, report: ReportOption = None) -> None:
    """Measure Deskside beside llama-server, llama_cpp.server, CTranslate2 and ik_llama.cpp: same files and threads."""
    if report is not None:
        _show(load_peer_run(report), as_json=as_json)
        return
    with show_progress() as progress:
        run, out = compare_peers(settings, progress)
    _show(run, as_json=as_json)
    print(f"raw samples: {out}; the servers' own output: {out.with_suffix('.logs')}", file=sys.stderr)
    if any(sample.error for made in run.passes for sample in made.samples):
        raise typer.Exit(SOME_FAILED)


def render_peers(run: PeerRun, figures: PeerFigures, aims: Sequence[PeerAim], console: Console) -> None:
    """Print the aims, machine and versions, every row, and notes on how to read them."""
    console.print(_aims_table(aims))
    console.print()
    for line in _heading(run):
        console.print(Text(line))
    tables = [*_online_tables(figures)]
    tables += [_talk_table(figures.talks)] if figures.talks else []
    tables += [_offline_table(figures.offline)] if figures.offline else []
    tables += [_prompt_table(figures.prompts)] if figures.prompts else []
    for table in tables:
        console.print()
        console.print(table)
    console.print()
    for line in _notes(run, figures):
        console.print(Text(f"- {line}"))


def _show(run: PeerRun, *, as_json: bool) -> None:
    figures = figures_of(run)
    aims = judge(figures)
    if as_json:
        shown = run.model_dump(mode="json", exclude={"passes"})
        shown |= {"figures": figures.model_dump(mode="json"), "aims": [aim.model_dump(mode="json") for aim in aims]}
        print(json.dumps(shown, ensure_ascii=False, indent=2))
        return
    render_peers(run, figures, aims, page())


def _heading(run: PeerRun) -> Iterator[str]:
    machine = run.machine
    kind = f" ({machine.processor})" if machine.processor else ""
    yield f"{machine.cpu}{kind}, {machine.logical_cores} logical cores; {machine.system}; {run.started_at}"
    kinds = [f"{name} {kind}" for name, build in run.builds.items() if (kind := vector_kind(build))]
    if kinds:
        yield f"llama.cpp built for: {'; '.join(kinds)}"
    versions = ", ".join(f"{name} {version}" for name, version in (machine.packages | run.peers).items())
    yield f"{run.threads} threads each, {run.repetitions} repetitions in alternating order; {versions}"
    if run.quick:
        yield "--quick: few requests; this checks that everything works and measures nothing well"


def _online_tables(figures: PeerFigures) -> Iterator[Table]:
    """Requests per second, then latency, of each task and way."""
    for task, way in dict.fromkeys((row.task, row.way) for row in figures.rows):
        rows = [row for row in figures.rows if (row.task, row.way) == (task, way)]
        ours = next((row for row in rows if row.server.startswith(f"{DESKSIDE},")), None)
        best = best_peer(figures, task, (way,), ours.server.partition(", ")[2]) if ours else None
        found = f"; best of {LLAMA_SERVER}: {profile(best.server)}" if best else ""
        rates = _table(f"{task}, {way}: requests per second{found}", RATE_COLUMNS)
        latency = _table(f"{task}, {way}: latency in ms, and right answers", LATENCY_COLUMNS)
        for row in rows:
            rates.add_row(row.server, *_rate_cells(row, ours))
            latency.add_row(row.server, *_latency_cells(row))
        yield from (rates, latency)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("server", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _rate_cells(row: OnlineRow, ours: OnlineRow | None) -> Iterator[str]:
    yield str(row.requests)
    yield str(row.errors)
    yield f"{row.rate:.2f} [{min(row.rates):.2f}, {max(row.rates):.2f}]"
    found = None if row.server.startswith(f"{DESKSIDE},") else ratio(ours, row)
    yield f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if found else ""


def _latency_cells(row: OnlineRow) -> Iterator[str]:
    for value in (row.ttft_p50_ms, row.ttft_p95_ms, row.e2e_p50_ms):
        yield "–" if value is None else f"{value:.0f}"
    yield f"{row.right} of {row.judged}" if row.judged else _lengths(row)


def _lengths(row: OnlineRow) -> str:
    return f"{row.wrong_length} of wrong length" if row.wrong_length else ""


def _offline_table(rows: Sequence[OfflineRow]) -> Table:
    title = "Offline: a file of mails, without the process's start and load"
    table = _table(title, ("way", "mails/s [range]", "right"))
    for row in rows:
        if not row.rates:
            why = (row.error or "start and load took longer than all mails: too few mails, or a busy machine")[:100]
            table.add_row(row.server, row.way, "–", why)
            continue
        spread = f"[{min(row.rates):.2f}, {max(row.rates):.2f}]"
        table.add_row(row.server, row.way, f"{row.rate:.2f} {spread}", f"{row.right} of {row.judged}")
    return table


def _talk_table(rows: Sequence[TalkRow]) -> Table:
    ours = next((row for row in rows if row.server.startswith(f"{DESKSIDE},")), None)
    n_turns = max(len(row.turns_ms) for row in rows)
    columns = (
        *(f"turn {turn}" for turn in range(1, n_turns + 1)),
        "later turns [range]",
        "it / ours",
        "kept",
        "errors",
    )
    table = _table("Conversations in turn: median TTFT in ms, streamed, one request at a time", columns)
    for row in rows:
        found = None if row is ours else sooner(ours, row)
        later = f"{row.later:.0f} [{min(row.later_ms):.0f}, {max(row.later_ms):.0f}]" if row.later_ms else "–"
        table.add_row(
            row.server,
            *("–" if value is None else f"{value:.0f}" for value in row.turns_ms),
            later,
            f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]" if found else "",
            "–" if row.kept is None else f"{row.kept:.0%}",
            f"{row.errors} of {row.requests}",
        )
    return table


def _prompt_table(rows: Sequence[PromptRow]) -> Table:
    table = _table("Prompts without a server: tokens per second", ("file", "step", "tokens/s [range]"))
    for row in rows:
        table.add_row(row.engine, row.file, row.step, f"{row.rate:.0f} [{min(row.rates):.0f}, {max(row.rates):.0f}]")
    return table


def _aims_table(aims: Sequence[PeerAim]) -> Table:
    table = Table(title="Aims", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("verdict", "aim", "wanted", "found"):
        table.add_column(name, overflow="fold")
    for aim in aims:
        table.add_row(aim.verdict, aim.name, aim.wanted, aim.found)
    return table


def _notes(run: PeerRun, figures: PeerFigures) -> Iterator[str]:
    for name, build in run.builds.items():
        yield f"{name}: {build}"
    yield (
        "the xllamacpp wheel is a generic build, Deskside's llama.cpp is compiled for this processor: part of the "
        "difference is the build. llama_cpp.server and Deskside run the same compiled library"
    )
    for server in {(server.name, server.settings): server for server in run.servers}.values():
        size = mebibytes(server.size_bytes)
        yield f"{server.name}: {server.settings}; {server.quantization}, sha256 {server.sha256[:12]}…, {size}"
    yield (
        f"{run.examples}; no mail twice on one server; all is greedy; servers as shipped answer a third of the "
        "requests, once; llama_cpp.server a third of them. Of llama-server's other profiles the one with the best "
        "median at a row is the peer there"
    )
    if figures.talks:
        yield (
            "conversations: everybody's first turn, then everybody's second; about 600 tokens of new text and 24 of "
            "answer each, which go back with the next turn; every server has room for a whole conversation; kept: of "
            "the later turns' prompts, what the server says it did not compute again"
        )
    if figures.prompts:
        yield (
            "prompts: one process each in turns, an empty cache; ik_llama.cpp repacks weights at load and has flash "
            "attention off, with which it aborts on Gemma 3's heads"
        )
    shares = [f"{row.task}, {row.way} {row.decode_share:.3f}" for row in figures.rows if row.decode_share is not None]
    if shares:
        yield f"llama_decode's share of the engine's step: {'; '.join(shares)}"
    for row in figures.bare:
        yield (
            f"engine over a bare llama_decode loop with the same batches, {row.task}: {row.ratio:.3f} "
            f"[{min(row.ratios):.3f}, {max(row.ratios):.3f}], {row.tokens_per_s:.0f} tokens/s"
        )
    if figures.round_trip_ms is not None:
        yield f"one token for one client: round trip p50 {figures.round_trip_ms:.1f} ms"
    ours = [row for row in figures.rows if row.server.startswith(f"{DESKSIDE},")]
    prompts = {f"{row.task}, {row.way}": row.prompt_tokens for row in ours if row.prompt_tokens is not None}
    yield "mean prompt tokens: " + "; ".join(f"{task} {tokens:.0f}" for task, tokens in prompts.items())
    yield "rates are medians of the repetitions, ratios those of medians; [ ] is the range over the repetitions"
    yield "TTFT and E2E count from the scheduled send; a decision is answered whole, so its TTFT is its E2E"
