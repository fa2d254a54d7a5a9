"""A card's section about the calibration: which answers may go out without a person, and how true confidences are."""

from collections.abc import Iterator, Sequence

from models.calibration.record import Bin, Calibration, Promise

from .markdown import table
from .svg import line, opening, text

RELIABILITY_FILE = "calibration.svg"

_WIDTH, _HEIGHT = 420, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 396, 62, 392
_STYLE = """
.true { stroke: #818b98; stroke-width: 1.5; stroke-dasharray: 5 4 }
.raw { fill: none; stroke: #bc4c00; stroke-width: 2 } .raw-dot { fill: #bc4c00 }
.fitted { fill: none; stroke: #0969da; stroke-width: 2 } .fitted-dot { fill: #0969da }
@media (prefers-color-scheme: dark) {
.raw { stroke: #db6d28 } .raw-dot { fill: #db6d28 } .fitted { stroke: #4493f8 } .fitted-dot { fill: #4493f8 }
}"""


def render_calibration(calibration: Calibration) -> str:
    """The section's text, without its heading."""
    head = ("At least right", "Threshold", "Automatic", "Of these right", "Lower limit, 95 %")
    source = f" ({calibration.source})" if calibration.source else ""
    parts = [
        f"{calibration.right} of {calibration.examples} held-out examples{source} were answered right. Divided by a "
        f"temperature of {calibration.temperature:.3g}, the log-probabilities of the labels give confidences with an "
        f"expected error of {calibration.ece_after:.3f}, {calibration.ece_before:.3f} without it "
        f"({len(calibration.bins)} bins of equally many examples).",
        "An answer is `automatic` if its confidence reaches the threshold of the target that applies; "
        f"{calibration.target:g} does unless `--target` names another.",
        table(head, (_row(promise, calibration) for promise in calibration.promises)),
        f"![Confidence and share of right answers]({RELIABILITY_FILE})" if calibration.bins else "",
    ]
    return "\n\n".join(part for part in parts if part)


def promise_told(promise: Promise, examples: int) -> str:
    """A promise in one line, for a terminal."""
    if promise.threshold is not None:
        share = promise.automatic / examples
        return f"{promise.target:g}: from confidence {promise.threshold:g}, {share:.0%} of the answers"
    if promise.needed is None:
        return f"{promise.target:g}: no answer; more examples would not help, a better model would"
    return (
        f"{promise.target:g}: no answer; about {promise.needed} calibration examples would be needed ({examples} now)"
    )


def _row(promise: Promise, calibration: Calibration) -> Sequence[str]:
    mark = "**" if promise.target == calibration.target else ""
    if promise.threshold is None or promise.bound is None:
        why = "more examples would not help"
        if promise.needed is not None:
            why = f"about {promise.needed} examples would be needed"
        return (f"{mark}{promise.target:g}{mark}", "none", "no answer", why, "–")
    return (
        f"{mark}{promise.target:g}{mark}",
        f"{promise.threshold:.4f}",
        f"{promise.automatic / calibration.examples:.1%}",
        f"{promise.right} of {promise.automatic}",
        f"{promise.bound:.3f}",
    )


def render_reliability(calibration: Calibration) -> str | None:
    """The picture: for each bin its mean confidence and the share of right answers, with and without temperature.

    None without bins.
    """
    if not calibration.bins:
        return None
    every = (*calibration.bins, *calibration.raw_bins)
    low = min(min(one.confidence, one.right / one.total) for one in every)
    low = max(0.0, int(low * 10) / 10)
    parts = [
        opening(_WIDTH, _HEIGHT, "Share of right answers by confidence", _STYLE),
        text(_LEFT, 24, f"Confidence of {calibration.examples} held-out answers", "title"),
        line(_LEFT, 42, _LEFT + 22, 42, "fitted"),
        text(_LEFT + 28, 46, "calibrated", "small"),
        line(_LEFT + 110, 42, _LEFT + 132, 42, "raw"),
        text(_LEFT + 138, 46, "as the model says", "small"),
        *_grid(low),
        line(_LEFT, _BOTTOM, _RIGHT, _TOP, "true"),
        text((_LEFT + _RIGHT) / 2, _BOTTOM + 36, "mean confidence of a bin", "small", "middle"),
        text(_LEFT, _TOP - 4, "share right", "small"),
        *_curve(calibration.raw_bins, low, "raw"),
        *_curve(calibration.bins, low, "fitted"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _x(share: float, low: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (share - low) / (1 - low)


def _y(share: float, low: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * (share - low) / (1 - low)


def _grid(low: float) -> Iterator[str]:
    step = 0.1 if low >= 0.5 else 0.2
    for place in range(round((1 - low) / step + 0.001) + 1):
        share = 1 - place * step
        if share < low - 1e-9:
            break
        at, down = _x(share, low), _y(share, low)
        yield line(_LEFT, down, _RIGHT, down, "grid")
        yield text(_LEFT - 8, down + 4, f"{share:.1f}", "small", "end")
        yield text(at, _BOTTOM + 18, f"{share:.1f}", "small", "middle")
    yield line(_LEFT, _BOTTOM, _RIGHT, _BOTTOM, "axis")
    yield line(_LEFT, _TOP, _LEFT, _BOTTOM, "axis")


def _curve(bins: Sequence[Bin], low: float, style: str) -> Iterator[str]:
    points = [(_x(one.confidence, low), _y(one.right / one.total, low)) for one in bins]
    if points:
        yield f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{style}"/>'
    yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{style}-dot"/>' for x, y in points)
