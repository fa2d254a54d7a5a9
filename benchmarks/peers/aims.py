"""The engine's aims beside its peers: for each the bound, the measured number and the verdict. Pure."""

from typing import Literal

from models.common.record import Record

from .figures import OnlineRow, PeerFigures, RateRatio, ratio
from .servers import BEST, CHOSEN
from .tasks import (
    BURST,
    CHAT,
    COMPLETION,
    CONSTRAINED,
    DECISIONS,
    DESKSIDE,
    FEW_SHOT,
    LABEL,
    LABEL_ALONE,
    LLAMA_CPP_SERVER,
    LLAMA_SERVER,
    REPLY,
    REPLY_ALONE,
)

AimVerdict = Literal["met", "missed", "not measured"]
PEER_WAYS = (CHAT, CONSTRAINED)
LABEL_WAYS = (DECISIONS, CONSTRAINED)
# The same work on both sides; decisions have no peer.
COMPARABLE = (
    (LABEL, CHAT), (LABEL, CONSTRAINED), (REPLY, CHAT), (FEW_SHOT, COMPLETION), (BURST, COMPLETION),
    (LABEL_ALONE, CHAT), (LABEL_ALONE, CONSTRAINED), (REPLY_ALONE, CHAT),
)  # fmt: skip


class PeerAim(Record):
    """One aim: `wanted` is the bound, `found` the measured value, both as text."""

    name: str
    wanted: str
    found: str
    verdict: AimVerdict


class Contenders(Record):
    """The names of the compared servers. Pairs of one suffix serve the same file."""

    ours: str = f"{DESKSIDE}, {CHOSEN}"
    best: str = f"{LLAMA_SERVER} {BEST}, {CHOSEN}"
    python: str = f"{LLAMA_CPP_SERVER} {BEST}, {CHOSEN}"
    ours_f16: str = f"{DESKSIDE}, F16"
    ours_q4: str = f"{DESKSIDE}, Q4_K_M"
    best_q4: str = f"{LLAMA_SERVER} {BEST}, Q4_K_M"
    ours_base: str = f"{DESKSIDE}, base Q4_K_M"
    best_base: str = f"{LLAMA_SERVER} {BEST}, base Q4_K_M"


def judge(figures: PeerFigures) -> tuple[PeerAim, ...]:
    """Judge every aim."""
    names = Contenders()
    ours = figures.fastest(LABEL, names.ours, LABEL_WAYS)
    ours_any = max(
        (row for name in (names.ours, names.ours_f16) if (row := figures.fastest(LABEL, name, LABEL_WAYS))),
        key=lambda row: row.rate,
        default=None,
    )
    best = figures.fastest(LABEL, names.best, PEER_WAYS)
    best_q4 = figures.fastest(LABEL, names.best_q4, PEER_WAYS)
    python = figures.fastest(LABEL, names.python, PEER_WAYS)
    decisions = _pair(figures, LABEL, DECISIONS, names.ours, names.ours_q4)
    best_file = f"labels, our best file / {names.best_q4}"
    return (
        _rates("plain generation, same file", 1.0, _pair(figures, REPLY, CHAT, names.ours, names.best)),
        _rates(f"labels through decisions or choice{_how(ours, best)}, same file", 1.1, ratio(ours, best)),
        _rates("cold burst, shared prompt", 2.5, _pair(figures, BURST, COMPLETION, names.ours_base, names.best_base)),
        _rates(f"{best_file}{_how(ours_any, best_q4)}", 1.7, ratio(ours_any, best_q4)),
        _rates(f"labels{_how(ours, python)} / llama_cpp.server", 3.0, ratio(ours, python)),
        _rates("decisions, the chosen file / plain Q4_K_M", 1.5, decisions),
        _rates("replies, the chosen file / plain Q4_K_M", 1.5, _pair(figures, REPLY, CHAT, names.ours, names.ours_q4)),
        _rates("offline mails/s / CTranslate2 int8", 1.0, _offline(figures)),
        *(_ttft(figures, names, percent) for percent in (50, 95)),
        _engine(figures),
        _hop(figures),
    )


def _pair(figures: PeerFigures, task: str, way: str, first: str, second: str) -> RateRatio | None:
    return ratio(figures.row(task, way, first), figures.row(task, way, second))


def _how(first: OnlineRow | None, second: OnlineRow | None) -> str:
    return f" ({first.server.split(', ')[1]} {first.way} / {second.way})" if first and second else ""


def _rates(name: str, least: float, found: RateRatio | None) -> PeerAim:
    wanted = f"≥ {least:g}"
    if found is None:
        return PeerAim(name=name, wanted=wanted, found="–", verdict="not measured")
    shown = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    return PeerAim(name=name, wanted=wanted, found=shown, verdict="met" if found.value >= least else "missed")


def _offline(figures: PeerFigures) -> RateRatio | None:
    first = max((r for r in figures.offline if r.server == DESKSIDE and r.rates), key=lambda r: r.rate, default=None)
    second = max((r for r in figures.offline if r.server != DESKSIDE and r.rates), key=lambda r: r.rate, default=None)
    return ratio(first, second)


def _ttft(figures: PeerFigures, names: Contenders, percent: int) -> PeerAim:
    """The worst quotient over all comparable tasks: ≤ 1 if no task is worse."""
    quotients = {}
    for task, way in COMPARABLE:
        base = way == COMPLETION
        ours = figures.row(task, way, names.ours_base if base else names.ours)
        best = figures.row(task, way, names.best_base if base else names.best)
        first, second = (_ttft_ms(row, percent) for row in (ours, best))
        if first is not None and second:
            quotients[f"{task}, {way}"] = first / second
    name, wanted = f"TTFT p{percent} over llama-server's, worst task", "≤ 1"
    if not quotients:
        return PeerAim(name=name, wanted=wanted, found="–", verdict="not measured")
    worst = max(quotients, key=lambda task: quotients[task])
    above = sum(value > 1 for value in quotients.values())
    found = f"{quotients[worst]:.2f} ({worst}); above 1 in {above} of {len(quotients)}"
    return PeerAim(name=name, wanted=wanted, found=found, verdict="missed" if above else "met")


def _ttft_ms(row: OnlineRow | None, percent: int) -> float | None:
    return None if row is None else row.ttft_p50_ms if percent == 50 else row.ttft_p95_ms


def _engine(figures: PeerFigures) -> PeerAim:
    """The engine's tokens/s over a bare loop's: its own work beside llama_decode costs the rest."""
    name, wanted = "engine tokens/s over a bare llama_decode loop with the same batches, least task", "≥ 0.97"
    least = min(figures.bare, key=lambda row: row.ratio, default=None)
    if least is None:
        return PeerAim(name=name, wanted=wanted, found="–", verdict="not measured")
    return PeerAim(
        name=name,
        wanted=wanted,
        found=f"{least.ratio:.3f} [{min(least.ratios):.3f}, {max(least.ratios):.3f}] ({least.task})",
        verdict="met" if least.ratio >= 0.97 else "missed",
    )


def _hop(figures: PeerFigures) -> PeerAim:
    name, wanted = "HTTP and process, one client: round trip less engine step, ms", "≤ 5"
    if figures.hop_ms is None:
        return PeerAim(name=name, wanted=wanted, found="–", verdict="not measured")
    return PeerAim(
        name=name, wanted=wanted, found=f"{figures.hop_ms:.1f}", verdict="met" if figures.hop_ms <= 5 else "missed"
    )
