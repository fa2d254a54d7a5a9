"""Pictures, drawn with matplotlib (the `bench` extra), which is imported here only, on the first picture."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.comparison.figures import samples_of
from benchmarks.comparison.scoring import OTHER, ClassificationScore
from benchmarks.errors import ExtraMissing
from benchmarks.record import BenchRun


def confusion_picture(score: ClassificationScore, title: str, path: Path) -> None:
    """Draw the confusion matrix to a PNG: counts as text, each row shaded by its share."""
    figure, axes = _figure(8.0, 6.6)
    columns = (*score.labels, OTHER) if any(row[-1] for row in score.confusion) else score.labels
    counts = [row[: len(columns)] for row in score.confusion]
    shares = [[n / max(1, sum(row)) for n in row] for row in score.confusion]
    axes.imshow([row[: len(columns)] for row in shares], cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(counts):
        for x, n in enumerate(row):
            if n:
                axes.text(x, y, str(n), ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(score.labels)), score.labels)
    axes.set_xlabel("answered")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=11)
    _save(figure, path)


def latency_picture(run: BenchRun, path: Path) -> None:
    """Draw each arm's end-to-end latency distribution at the lowest concurrency to a PNG."""
    figure, axes = _figure(8.0, 4.5)
    users = min(run.workload.concurrency)
    for arm in run.arms:
        level = next((level for level in arm.levels if level.concurrency == users), None)
        values = sorted(1000 * (s.finished_s - s.scheduled_s) for s in level.samples if not s.error) if level else []
        if values:
            shares = [(i + 1) / len(values) for i in range(len(values))]
            style = "--" if arm.kind == "replayed" else "-"
            axes.step(values, shares, style, where="post", label=f"{arm.name}: {arm.model} ({arm.kind})")
    ticker = import_module("matplotlib.ticker")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(f"end to end, ms ({users} at a time)")
    axes.set_ylabel("share of requests")
    axes.set_title(f"{run.machine.cpu}, {sum(len(samples_of(arm)) for arm in run.arms)} requests", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, drawn to a file only."""
    if find_spec("matplotlib") is None:
        raise ExtraMissing("matplotlib is not installed; in Deskside's folder: .venv/bin/pip install -e '.[bench]'")
    figure = import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without date and version, the same figures give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
