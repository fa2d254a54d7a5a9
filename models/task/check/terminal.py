"""A report of `task check` in the terminal."""

from rich.text import Text

from models.common.console import page

from .finding import CheckReport

_SIGNS = {"mend": ("must be mended", "bold red"), "look": ("look at", "bold yellow"), "note": ("note", "bold")}


def print_report(report: CheckReport) -> None:
    """Print each finding with its examples and what mends it, then the learning curve, then the verdict."""
    out = page()
    sizes = ", ".join(f"{n:,} {split}" for split, n in report.sizes.items())
    out.print(f"{report.task}: {report.kind}; {sizes}")
    for finding in report.findings:
        sign, style = _SIGNS[finding.severity]
        out.print(Text.assemble("\n", (f"{sign}: {finding.kind}", style)))
        out.print(f"{finding.n:,} {finding.what}")
        for example in finding.examples:
            out.print(Text(f"    {example}"))
        if finding.mend:
            out.print(f"  → {finding.mend}")
    if report.curve:
        out.print(Text.assemble("\n", ("a word model, no language model", "bold")))
        for point in report.curve:
            out.print(f"  {point.n_rows:>6,} examples  {point.accuracy:.3f} [{point.low:.3f}, {point.high:.3f}]")
        out.print(report.advice)
    n_mend = sum(finding.severity == "mend" for finding in report.findings)
    n_look = sum(finding.severity == "look" for finding in report.findings)
    out.print(f"\n{n_mend} must be mended, {n_look} to look at")
