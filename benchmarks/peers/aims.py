"""The engine's aims beside its peers: for each the bound, the measured number and the verdict. Pure.

The peer of a row is the fastest profile of llama-server at that row, by its median. Where an aim goes beyond the bound,
both are named.
"""

from collections.abc import Sequence
from typing import Literal

from models.common.record import Record

from .figures import OnlineRow, PeerFigures, RateRatio, TalkRow, ratio, sooner
from .servers import BEST, CHOSEN
from .tasks import (
    BURST,
    CHAT,
    COMPLETION,
    CONSTRAINED,
    DECISIONS,
    DESKSIDE,
    FEW_SHOT,
    IK_LLAMA,
    LABEL,
    LABEL_ALONE,
    LLAMA_CPP_SERVER,
    LLAMA_SERVER,
    REPLY,
    REPLY_ALONE,
)

AimVerdict = Literal["aim met", "met", "missed", "not measured"]
PEER_WAYS = (CHAT, CONSTRAINED)
LABEL_WAYS = (DECISIONS, CONSTRAINED)
Q4, BASE_Q4 = "Q4_K_M", "base Q4_K_M"
# The same work on both sides; decisions have no peer.
COMPARABLE = (
    (LABEL, CHAT), (LABEL, CONSTRAINED), (REPLY, CHAT), (FEW_SHOT, COMPLETION), (BURST, COMPLETION),
    (LABEL_ALONE, CHAT), (LABEL_ALONE, CONSTRAINED), (REPLY_ALONE, CHAT),
)  # fmt: skip


class PeerAim(Record):
    """One aim: `wanted` is the bound, `found` the measured value, both as text.

    The verdict is `aim met` where the value reaches what is aimed at beyond the bound.
    """

    name: str
    wanted: str
    found: str
    verdict: AimVerdict


class Contenders(Record):
    """The names of the compared servers. Pairs of one suffix serve the same file."""

    ours: str = f"{DESKSIDE}, {CHOSEN}"
    python: str = f"{LLAMA_CPP_SERVER} {BEST}, {CHOSEN}"
    ours_f16: str = f"{DESKSIDE}, F16"
    ours_q4: str = f"{DESKSIDE}, {Q4}"
    ours_base: str = f"{DESKSIDE}, {BASE_Q4}"


def best_peer(figures: PeerFigures, task: str, ways: Sequence[str], file: str) -> OnlineRow | None:
    """The fastest of llama-server's profiles with that file, in its fastest way; None if none was measured.

    A profile that answered fewer requests, as the one as shipped does, had fewer clients at a time: no candidate.
    """
    rows = [row for row in figures.rows if row.task == task and row.way in ways and _is_peer(row.server, file)]
    most = max((row.requests / len(row.rates) for row in rows), default=0)
    return max((row for row in rows if row.requests / len(row.rates) == most), key=lambda row: row.rate, default=None)


def best_listener(figures: PeerFigures, file: str) -> TalkRow | None:
    """llama-server's profile with the soonest first token of a conversation's later turns; None if not measured."""
    rows = [row for row in figures.talks if row.later_ms and _is_peer(row.server, file)]
    return min(rows, key=lambda row: row.later, default=None)


def profile(server: str) -> str:
    """The profile in the name of a peer's server: `split` of `llama-server split, chosen`."""
    return server.partition(",")[0].partition(" ")[2]


def _is_peer(server: str, file: str) -> bool:
    return server.startswith(f"{LLAMA_SERVER} ") and server.endswith(f", {file}")


def judge(figures: PeerFigures) -> tuple[PeerAim, ...]:
    """Judge every aim."""
    names = Contenders()
    ours = figures.fastest(LABEL, names.ours, LABEL_WAYS)
    ours_any = max(
        (row for name in (names.ours, names.ours_f16) if (row := figures.fastest(LABEL, name, LABEL_WAYS))),
        key=lambda row: row.rate,
        default=None,
    )
    alone = figures.fastest(LABEL_ALONE, names.ours, LABEL_WAYS)
    replies, burst = figures.row(REPLY, CHAT, names.ours), figures.row(BURST, COMPLETION, names.ours_base)
    decisions = _pair(figures, LABEL, DECISIONS, names.ours, names.ours_q4)
    talk = next((row for row in figures.talks if row.server == names.ours), None)
    listener = best_listener(figures, CHOSEN)
    by = f" ({profile(listener.server)})" if listener else ""
    return (
        _beside("labels of the same file", ours, best_peer(figures, LABEL, PEER_WAYS, CHOSEN), 1.3, 1.7),
        _beside("replies of the same file", replies, best_peer(figures, REPLY, (CHAT,), CHOSEN), 1.25, 1.5),
        _beside("one client's labels", alone, best_peer(figures, LABEL_ALONE, PEER_WAYS, CHOSEN), 1.3, 1.8),
        _rates(f"conversations, first token of later turns{by}: theirs / ours", 1.0, sooner(talk, listener)),
        _beside("cold burst, shared prompt", burst, best_peer(figures, BURST, (COMPLETION,), BASE_Q4), 3.0),
        _beside(f"labels of our best file / {Q4}", ours_any, best_peer(figures, LABEL, PEER_WAYS, Q4), 1.7),
        _beside("labels / llama_cpp.server", ours, figures.fastest(LABEL, names.python, PEER_WAYS), 3.0),
        _rates("decisions, the chosen file / plain Q4_K_M", 1.5, decisions),
        _rates("replies, the chosen file / plain Q4_K_M", 1.5, _pair(figures, REPLY, CHAT, names.ours, names.ours_q4)),
        _rates("offline mails/s / CTranslate2 int8", 1.0, _offline(figures)),
        _prompts(figures),
        *(_ttft(figures, names, percent) for percent in (50, 95)),
        _engine(figures),
        _hop(figures),
    )


def _pair(figures: PeerFigures, task: str, way: str, first: str, second: str) -> RateRatio | None:
    return ratio(figures.row(task, way, first), figures.row(task, way, second))


def _beside(
    name: str, ours: OnlineRow | None, theirs: OnlineRow | None, least: float, aim: float | None = None
) -> PeerAim:
    """The aim of one row over another; the name tells our file and way, and the peer's profile and way."""
    if ours and theirs:
        name += f" ({ours.server.split(', ')[1]} {ours.way} / {profile(theirs.server)} {theirs.way})"
    return _rates(name, least, ratio(ours, theirs), aim)


def _rates(name: str, least: float, found: RateRatio | None, aim: float | None = None) -> PeerAim:
    wanted = f"≥ {least:g}" + (f", aim {aim:g}" if aim else "")
    if found is None:
        return PeerAim(name=name, wanted=wanted, found="–", verdict="not measured")
    shown = f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    verdict: AimVerdict = "missed" if found.value < least else "aim met" if aim and found.value >= aim else "met"
    return PeerAim(name=name, wanted=wanted, found=shown, verdict=verdict)


def _offline(figures: PeerFigures) -> RateRatio | None:
    first = max((r for r in figures.offline if r.server == DESKSIDE and r.rates), key=lambda r: r.rate, default=None)
    second = max((r for r in figures.offline if r.server != DESKSIDE and r.rates), key=lambda r: r.rate, default=None)
    return ratio(first, second)


def _prompts(figures: PeerFigures) -> PeerAim:
    """The least quotient of our faster products over ik_llama.cpp's, among all files and steps."""
    steps = {(row.file, row.step): row for row in figures.prompts if row.engine == IK_LLAMA}
    quotients = {}
    for (file, step), theirs in steps.items():
        ours = [row for row in figures.prompts if (row.file, row.step) == (file, step) and row is not theirs]
        if found := ratio(max(ours, key=lambda row: row.rate, default=None), theirs):
            quotients[f" ({file}, {step})"] = found
    least = min(quotients, key=lambda shown: quotients[shown].value, default="")
    return _rates(f"prompts / ik_llama.cpp, least{least}", 1.0, quotients.get(least))


def _ttft(figures: PeerFigures, names: Contenders, percent: int) -> PeerAim:
    """The worst quotient over all comparable tasks: ≤ 1 if no task is worse."""
    quotients = {}
    for task, way in COMPARABLE:
        base = way == COMPLETION
        ours = figures.row(task, way, names.ours_base if base else names.ours)
        best = best_peer(figures, task, (way,), BASE_Q4 if base else CHOSEN)
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
