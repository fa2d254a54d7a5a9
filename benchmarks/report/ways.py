"""A comparison of ways for people: the verdict, then tables in 80 columns, or Markdown for a pull request.

Both show the same rows and sentences. What was replayed says so in its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.ways.judge import SIGNIFICANT, BesideBest, WayFigures, WayJudgement
from benchmarks.ways.record import WayComparison, WayRecord
from models.common.stats import Interval


@dataclass(frozen=True, slots=True)
class _Grid:
    """A table as texts: title, column heads, rows."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def render_ways(comparison: WayComparison, judgement: WayJudgement | None, console: Console) -> None:
    """Print the verdict, the tables and the notes."""
    for line in verdict(comparison, judgement):
        console.print(Text(line))
    for grid in _grids(comparison, judgement):
        table = Table(title=grid.title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for place, head in enumerate(grid.heads):
            table.add_column(head, justify="right" if place else "left", no_wrap=place == 0)
        for row in grid.rows:
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print()
    for line in notes_of(comparison, judgement):
        console.print(Text(f"- {line}"))


def ways_markdown(comparison: WayComparison, judgement: WayJudgement | None) -> str:
    """The same as Markdown."""
    parts = [f"### Every way on {comparison.task}", "\n".join(verdict(comparison, judgement))]
    for grid in _grids(comparison, judgement):
        head = f"| {' | '.join(grid.heads)} |\n|{'---|' * len(grid.heads)}"
        parts.append("\n".join([f"**{grid.title}**\n", head, *(f"| {' | '.join(row)} |" for row in grid.rows)]))
    parts.append("\n".join(f"- {line}" for line in notes_of(comparison, judgement)))
    return "\n\n".join(parts) + "\n"


def verdict(comparison: WayComparison, judgement: WayJudgement | None) -> Iterator[str]:
    """The finding in sentences."""
    if judgement is None:
        yield f"{comparison.task}: no way could be measured"
        return
    best, others = judgement.best, [way for way in judgement.ways if way.beside is not None]
    score = _interval(best.measures[0].value)
    yield f"{comparison.task}, {judgement.n} test examples: {best.name} is best, {judgement.measure} {score}."
    near = [way.name for way in others if way.beside is not None and not way.beside.real]
    worse = [way.name for way in others if way.beside is not None and way.beside.real]
    if near:
        yield f"Not shown to be worse: {', '.join(near)}."
    if worse:
        yield f"Worse: {', '.join(worse)}."
    if others:
        yield _power(others[0])
    if comparison.quick:
        yield "Of few examples (--quick): this shows that everything works, and little else."


def _power(second: WayFigures) -> str:
    beside = second.beside
    assert beside is not None
    if beside.detectable is None:
        return f"{second.name} answers almost as the best does: {beside.n} examples cannot tell them apart."
    return (
        f"With {beside.n} examples a difference from {second.name} shows in four of five runs if it is "
        f"{100 * beside.detectable:.1f} points."
    )


def notes_of(comparison: WayComparison, judgement: WayJudgement | None) -> Iterator[str]:
    """Each way in words, the ways that are absent, and the method."""
    for way in comparison.ways:
        if not way.skipped:
            yield f"{way.name}: {way.how}{_facts(way)}"
    for way in comparison.ways:
        if way.skipped:
            yield f"not measured: {way.name}: {way.skipped}"
    for line in comparison.warnings:
        yield f"warning: {line}"
    if judgement is not None:
        yield _twice(judgement)
        yield _method(judgement, comparison)
    machine = comparison.machine
    yield f"{machine.cpu}, {machine.logical_cores} logical cores; {machine.system}; {comparison.started_at}"


def _facts(way: WayRecord) -> str:
    model = f"; {way.model}" if way.model else ""
    quantization = f" {way.quantization}" if way.quantization else ""
    cost = f"; ${way.cost_usd:.4f} spent" if way.cost_usd is not None else ""
    # The address of a server of this run says nothing.
    source = f"; {way.source}" if way.source and way.sha256 is None else ""
    return f"{model}{quantization}{source}{cost}"


def _twice(judgement: WayJudgement) -> str:
    twice = judgement.twice
    if twice is None:
        return "A/A: no model was asked twice, so noise of the models themselves is not known"
    return (
        f"A/A: {twice.way} asked twice, {twice.n_changed} of {twice.n} answers changed, "
        f"difference {twice.difference:+.3f} (p {_p(twice.p_value)})"
    )


def _method(judgement: WayJudgement, comparison: WayComparison) -> str:
    binary = judgement.measure in ("accuracy", "exact")
    test = "exact McNemar, Newcombe" if binary else "each example's own score: sign flips, bootstrap"
    n = len(judgement.ways) - 1
    return (
        f"intervals of 95 %; differences paired ({test}), p corrected for {n} comparisons (Holm); "
        f"real: p < {SIGNIFICANT:g} and more than A/A's; chosen on {comparison.n_validation} validation examples"
    )


def _grids(comparison: WayComparison, judgement: WayJudgement | None) -> Iterator[_Grid]:
    if judgement is not None:
        yield _beside(judgement)
        yield _more(comparison, judgement)
    if comparison.curve:
        yield _curve(comparison)


def _beside(judgement: WayJudgement) -> _Grid:
    rows = [(way.name, _interval(way.measures[0].value), *_difference(way.beside)) for way in judgement.ways]
    if judgement.twice is not None:
        twice = judgement.twice
        rows.append(("A/A", "", f"{twice.difference:+.3f}", _p(twice.p_value), ""))
    return _Grid("Test split, best first", ("way", judgement.measure, "minus the best", "p", "real"), tuple(rows))


def _difference(beside: BesideBest | None) -> tuple[str, str, str]:
    if beside is None:
        return "best", "", ""
    found = beside.difference
    shown = f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return shown, _p(beside.corrected_p), "yes" if beside.real else "no"


def _more(comparison: WayComparison, judgement: WayJudgement) -> _Grid:
    ways = {way.name: way for way in comparison.ways}
    names = [measure.name for measure in judgement.best.measures[1:]]
    rows = tuple(
        (way.name, *(_interval(one.value) for one in way.measures[1:]), str(way.n), _minutes(ways[way.name]))
        for way in judgement.ways
    )
    return _Grid("Other measures; minutes to make", ("way", *names, "n", "minutes"), rows)


def _minutes(way: WayRecord) -> str:
    if way.made_s is None:
        return "unknown"
    return f"{way.made_s / 60:.1f}" if way.made_s >= 3 or not way.made_s else "<0.1"


def _curve(comparison: WayComparison) -> _Grid:
    names = list(dict.fromkeys(part.way for part in comparison.curve))
    sizes = list(dict.fromkeys(part.n_examples for part in comparison.curve))
    found = {(part.way, part.n_examples): part for part in comparison.curve}
    rows = []
    for size in sizes:
        cells = []
        for name in names:
            part = found[(name, size)]
            cells.append(f"{part.mean:.3f}" + (f" [{part.low:.3f}, {part.high:.3f}]" if part.draws > 1 else ""))
        rows.append((f"{size:,}", *cells))
    return _Grid("With fewer examples: mean [lowest, highest] of draws", ("examples", *names), tuple(rows))


def _interval(value: Interval) -> str:
    return f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
