"""A score as a table for a person."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .scoring import OTHER, Score


def render_score(model: str, score: Score, console: Console | None = None) -> None:
    """Print accuracy and macro-F1 with their intervals, and one row a label."""
    console = console or Console(soft_wrap=True)
    accuracy, macro = score.accuracy, score.macro_f1
    console.print(
        Text(
            f"{model}: accuracy {accuracy.estimate:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] "
            f"({score.correct} of {score.total}; Wilson 95 %), "
            f"macro-F1 {macro.estimate:.3f} [{macro.low:.3f}, {macro.high:.3f}] (bootstrap 95 %)"
        )
    )
    table = Table("label")
    for name in ("n", "precision", "recall", "F1", "mostly taken for"):
        table.add_column(name, justify="right")
    for i, row in enumerate(score.classes):
        figures = (f"{row.precision:.3f}", f"{row.recall:.3f}", f"{row.f1:.3f}")
        table.add_row(row.label, str(row.support), *figures, _confused(score, i))
    console.print(table)


def _confused(score: Score, index: int) -> str:
    others = [(n, i) for i, n in enumerate(score.confusion[index]) if i != index and n]
    if not others:
        return "–"
    count, column = max(others)
    return f"{(*score.labels, OTHER)[column]} ({count})"
