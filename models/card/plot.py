"""Size, speed and loss of every measured file in one picture: an SVG, sharp in a README, readable in light and dark.

x is the loss, y the speed, the area of a dot the file's size. The budget is a line, the noise floor a grey band. Where
answers have a score, a label has the interval of its difference, F16's label the score.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.common.machine import mebibytes
from models.quality import Candidate, Quality

from .svg import line, nice, opening, text

PLOT_FILE = "quality.svg"

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 735, 76, 380
# Left end of the logarithmic axis, in pixels; the reference, with a loss of 0, is drawn to the left of it.
_START, _REFERENCE = 106, 82
_REFERENCE_NAME = "F16"
_CHARACTER, _LINE = 7.0, 15.0
_CLASSES = {"chosen": "best", "within budget": "within", "undoes the fine-tune": "undone"}
_LEGEND = (("best", "chosen"), ("within", "within budget"), ("over", "over budget"), ("undone", "undoes the fine-tune"))
_STYLE = """
.noise { fill: #818b98; fill-opacity: 0.15 }
.budget { stroke: #9a6700; stroke-width: 1.5; stroke-dasharray: 5 4 }
.best { fill: #1a7f37; stroke: #1f2328; stroke-width: 2 }
.within { fill: #0969da; fill-opacity: 0.75 }
.over { fill: #bc4c00; fill-opacity: 0.75 }
.undone { fill: #cf222e; fill-opacity: 0.75 }
@media (prefers-color-scheme: dark) {
.budget { stroke: #d29922 } .best { fill: #3fb950; stroke: #f0f6fc } .within { fill: #4493f8 }
.over { fill: #db6d28 } .undone { fill: #f85149 }
}"""


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    radius: float
    style: str
    label: str


@dataclass(frozen=True)
class _Box:
    """An axis-parallel box: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "_Box") -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)


class _Scales:
    """Loss (log) and speed (linear) to pixels. The reference, with a loss of 0, is drawn apart."""

    def __init__(self, losses: Sequence[float], speeds: Sequence[float]) -> None:
        positive = [loss for loss in losses if loss > 0]
        self.low = math.floor(math.log10(min(positive)))
        self.high = max(math.ceil(math.log10(max(positive))), self.low + 1)
        self.step = nice((max(speeds) - min(speeds)) / 4 or max(speeds) / 4)
        self.bottom = self.step * max(math.floor(min(speeds) / self.step - 0.5), 0)
        self.top = self.step * math.ceil(max(speeds) / self.step + 0.5)

    def x(self, loss: float) -> float:
        if loss <= 0:
            return _REFERENCE
        return _START + (_RIGHT - _START) * (math.log10(loss) - self.low) / (self.high - self.low)

    def y(self, speed: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (speed - self.bottom) / (self.top - self.bottom)


def render_plot(quality: Quality) -> str | None:
    """The picture as SVG text, the same for the same figures; None if no candidate has both a loss and a speed."""
    shown = [(one, one.score_per_s) for one in quality.candidates if one.score_per_s is not None and _is_placed(one)]
    if not shown:
        return None
    floor = quality.noise.kl_mean if quality.noise is not None else 0.0
    budget = quality.budget.kl_mean
    scales = _Scales([budget, floor, *(_kl(one) for one, _ in shown)], [speed for _, speed in shown])
    largest = max(one.size_bytes for one, _ in shown)
    dots = [_dot(one, speed, scales, largest) for one, speed in shown]
    parts = [
        opening(_WIDTH, _HEIGHT, "Speed, loss and size of each file", _STYLE),
        *_frame(scales, quality),
        *_limits(scales, budget, floor),
        *_labels(dots, _reserved(scales, budget, floor)),
        # the largest first, so that none hides another
        *(_circle(dot) for dot in sorted(dots, key=lambda dot: -dot.radius)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _is_placed(one: Candidate) -> bool:
    return one.loss is not None and math.isfinite(one.loss.kl_mean)


def _kl(one: Candidate) -> float:
    return one.loss.kl_mean if one.loss is not None else 0.0


def _dot(one: Candidate, speed: float, scales: _Scales, largest: int) -> _Dot:
    style = _CLASSES.get(one.verdict, "over")
    radius = 13 * math.sqrt(one.size_bytes / largest)
    label = f"{one.name}, {mebibytes(one.size_bytes)}{_scored(one)}"
    return _Dot(scales.x(_kl(one)), scales.y(speed), radius, style, label)


def _scored(one: Candidate) -> str:
    score = one.answers.score if one.answers is not None else None
    if score is None:
        return ""
    if one.name == _REFERENCE_NAME:
        return f", {score.metric} {score.mean:.3f}"
    return f", {score.difference_low:+.3f} to {score.difference_high:+.3f}"


def _frame(scales: _Scales, quality: Quality) -> Iterator[str]:
    title = f"Examples/s ({quality.work}) by loss; the area of a dot is the file's size"
    if quality.metric is not None:
        title = f"Examples/s ({quality.work}) by loss; dot: file size; label: {quality.metric} less F16's (95 %)"
    yield text(_LEFT, 24, title, "title")
    x = float(_LEFT)
    for style, name in _LEGEND:
        yield f'<circle cx="{x + 6:.1f}" cy="44" r="5" class="{style}"/>'
        yield text(x + 16, 48, name, "small")
        x += 36 + _CHARACTER * len(name)
    for decade in range(scales.low, scales.high + 1):
        at = scales.x(10.0**decade)
        yield line(at, _TOP, at, _BOTTOM, "grid")
        yield text(at, _BOTTOM + 18, f"{10.0**decade:g}", "small", "middle")
    yield text(_REFERENCE, _BOTTOM + 18, "0", "small", "middle")
    for index in range(round((scales.top - scales.bottom) / scales.step) + 1):
        speed = scales.bottom + index * scales.step
        at = scales.y(speed)
        yield line(_LEFT, at, _RIGHT, at, "grid" if index else "axis")
        yield text(_LEFT - 8, at + 4, f"{speed:.4g}", "small", "end")
    yield line(_LEFT, _TOP, _LEFT, _BOTTOM, "axis")
    middle = (_LEFT + _RIGHT) / 2
    yield text(middle, _BOTTOM + 42, "mean KL divergence to F16, nats (F16 itself at 0)", "small", "middle")


def _limits(scales: _Scales, budget: float, floor: float) -> Iterator[str]:
    if floor > 0:
        width = scales.x(floor) - _LEFT
        yield f'<rect x="{_LEFT}" y="{_TOP}" width="{width:.1f}" height="{_BOTTOM - _TOP}" class="noise"/>'
        yield text(_LEFT + 4, _BOTTOM - 6, "noise floor", "small")
    if budget > 0:
        at = scales.x(budget)
        yield line(at, _TOP, at, _BOTTOM, "budget")
        yield text(at - 6, _BOTTOM - 6, f"budget {budget:g}", "small", "end")


def _reserved(scales: _Scales, budget: float, floor: float) -> list[_Box]:
    """The boxes in which `_limits` writes."""
    boxes = [_Box(_LEFT, _BOTTOM - 18, _LEFT + 11 * _CHARACTER, _BOTTOM)] if floor > 0 else []
    if budget > 0:
        at = scales.x(budget)
        boxes += [_Box(at - 12 * _CHARACTER, _BOTTOM - 18, at + 2, _BOTTOM), _Box(at - 2, _TOP, at + 2, _BOTTOM)]
    return boxes


def _labels(dots: Sequence[_Dot], reserved: list[_Box]) -> Iterator[str]:
    """Each label at the place where it covers least: beside its dot, above, below, or a bit further off."""
    taken = [*reserved, *(_Box(d.x - d.radius, d.y - d.radius, d.x + d.radius, d.y + d.radius) for d in dots)]
    for dot in sorted(dots, key=lambda dot: (dot.x, dot.y)):
        best = min(_places(dot), key=lambda box: sum(map(box.overlap, taken)) + 2 * abs(box.top + _LINE / 2 - dot.y))
        taken.append(best)
        if abs((best.top + best.bottom) / 2 - dot.y) > _LINE / 2:
            near = min(max(dot.x, best.left), best.right)
            yield line(dot.x, dot.y, near, best.bottom if best.bottom < dot.y else best.top, "axis")
        yield text(best.left, best.bottom - 3.5, dot.label, "label")


def _places(dot: _Dot) -> Iterator[_Box]:
    """Possible boxes of a label, the preferred first, all inside the frame."""
    width = _CHARACTER * len(dot.label)
    for shift in (0, 1, -1, 2, -2, 3, -3, 4, -4):
        top = dot.y - _LINE / 2 + shift * _LINE
        for left in (dot.x + dot.radius + 4, dot.x - dot.radius - 4 - width, dot.x - width / 2):
            if left >= _LEFT and left + width <= _WIDTH and top >= _TOP - _LINE and top + _LINE <= _BOTTOM:
                yield _Box(left, top, left + width, top + _LINE)
    if width > (_RIGHT - _LEFT) / 2:  # a very long name fits nowhere else
        yield _Box(_LEFT + 4, dot.y - 2 * _LINE, _LEFT + 4 + width, dot.y - _LINE)


def _circle(dot: _Dot) -> str:
    return f'<circle cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="{dot.radius:.1f}" class="{dot.style}"/>'
