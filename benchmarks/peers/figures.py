"""The figures of a comparison with peers, from its raw samples. Pure: the same file gives the same figures.

rate   whole answers / (last finish - first scheduled send), one per repetition; the report shows the median
ratio  of two medians; its range is that of the repetitions' own ratios
TTFT   first text chunk - scheduled send, over all repetitions; of conversations: medians of the turns
"""

from collections.abc import Sequence
from statistics import median

from benchmarks.load.workload import person_and_turn
from benchmarks.record import RequestSample
from models.common.record import Record
from models.common.stats import quantile

from .record import BarePass, OfflinePass, Pass, PeerRun, PromptPass
from .tasks import CONVERSATIONS, HOP, REPLY, REPLY_ALONE, REPLY_TOKENS

STEP, DECODE = "deskside_step_seconds_total", "deskside_decode_seconds_total"


class RateRatio(Record):
    """One rate over another: of the medians, with the range over the repetitions that both have."""

    value: float
    low: float
    high: float


class OnlineRow(Record):
    """One server at one task and way. `judged` counts answers to mails with a label, `wrong_length` replies."""

    task: str
    way: str
    server: str
    rates: tuple[float, ...]
    requests: int
    errors: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    e2e_p50_ms: float | None
    prompt_tokens: float | None
    judged: int
    right: int
    wrong_length: int
    decode_share: float | None

    @property
    def rate(self) -> float:
        """Requests per second, the median of the repetitions."""
        return median(self.rates)


class OfflineRow(Record):
    """One way of labelling a file: mails per second without start and load, one per repetition."""

    server: str
    way: str
    rates: tuple[float, ...]
    judged: int
    right: int
    error: str | None

    @property
    def rate(self) -> float:
        """Mails per second, the median of the repetitions; 0 when it failed."""
        return median(self.rates) if self.rates else 0.0


class BareRow(Record):
    """The engine's tokens/s over those of a bare `llama_decode` loop with the same batches, one per repetition."""

    task: str
    ratios: tuple[float, ...]
    tokens_per_s: float

    @property
    def ratio(self) -> float:
        """The median of the repetitions."""
        return median(self.ratios)


class TalkRow(Record):
    """First tokens of everybody's conversation with one server, in ms; None where no answer was whole.

    `turns_ms`: the median of each turn over all repetitions. `later_ms`: that of the second and later turns together,
    one per repetition. `kept`: the share of their prompts that the server had kept, if it says so.
    """

    server: str
    turns_ms: tuple[float | None, ...]
    later_ms: tuple[float, ...]
    kept: float | None
    requests: int
    errors: int

    @property
    def later(self) -> float:
        """The median of the repetitions."""
        return median(self.later_ms)


class PromptRow(Record):
    """Tokens/s of an engine at one step of prompts, one per timing."""

    file: str
    step: str
    engine: str
    rates: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The median of the timings."""
        return median(self.rates)


class PeerFigures(Record):
    """All figures of a run. `hop_ms`: round trip less the engine's step, one client, one token; None: not measured."""

    rows: tuple[OnlineRow, ...]
    offline: tuple[OfflineRow, ...]
    hop_ms: float | None
    round_trip_ms: float | None
    bare: tuple[BareRow, ...] = ()
    talks: tuple[TalkRow, ...] = ()
    prompts: tuple[PromptRow, ...] = ()

    def row(self, task: str, way: str, server: str) -> OnlineRow | None:
        """The row of that server, or None if not measured."""
        found = [row for row in self.rows if (row.task, row.way, row.server) == (task, way, server)]
        return found[0] if found else None

    def fastest(self, task: str, server: str, ways: Sequence[str]) -> OnlineRow | None:
        """The server's fastest row among `ways`, or None."""
        rows = [row for way in ways if (row := self.row(task, way, server)) is not None]
        return max(rows, key=lambda row: row.rate, default=None)


RatedRow = OnlineRow | OfflineRow | PromptRow


def figures_of(run: PeerRun) -> PeerFigures:
    """Compute every figure of the run."""
    groups: dict[tuple[str, str, str], list[Pass]] = {}
    talks: dict[str, list[Pass]] = {}
    for made in run.passes:
        if made.task == CONVERSATIONS:
            talks.setdefault(made.server, []).append(made)
        else:
            groups.setdefault((made.task, made.way, made.server), []).append(made)
    offline: dict[tuple[str, str], list[OfflinePass]] = {}
    for part in run.offline:
        offline.setdefault((part.server, part.way), []).append(part)
    prompts: dict[tuple[str, str, str], list[PromptPass]] = {}
    for timed in run.prompts:
        prompts.setdefault((timed.file, timed.step, timed.engine), []).append(timed)
    hops = [made for made in run.passes if made.task == HOP]
    return PeerFigures(
        rows=tuple(_row(key, passes) for key, passes in groups.items()),
        offline=tuple(_offline_row(key, parts) for key, parts in offline.items()),
        hop_ms=_hop_ms(hops),
        round_trip_ms=_quantile([_e2e_ms(s) for made in hops for s in _whole(made.samples)], 0.5),
        bare=tuple(_bare_row(one) for one in run.bare),
        talks=tuple(_talk_row(server, passes) for server, passes in talks.items()),
        prompts=tuple(_prompt_row(key, timed) for key, timed in prompts.items()),
    )


def ratio(first: RatedRow | None, second: RatedRow | None) -> RateRatio | None:
    """The first's rate over the second's, or None when either has no rate."""
    if first is None or second is None or not first.rates or not second.rates or not min(second.rates) > 0:
        return None
    each = [a / b for a, b in zip(first.rates, second.rates, strict=False)]
    return RateRatio(value=first.rate / second.rate, low=min(each), high=max(each))


def sooner(ours: TalkRow | None, theirs: TalkRow | None) -> RateRatio | None:
    """Their time to the first token of later turns over ours, or None when either has none."""
    if ours is None or theirs is None or not ours.later_ms or not theirs.later_ms or min(ours.later_ms) <= 0:
        return None
    each = [b / a for a, b in zip(ours.later_ms, theirs.later_ms, strict=False)]
    return RateRatio(value=theirs.later / ours.later, low=min(each), high=max(each))


def _row(key: tuple[str, str, str], passes: Sequence[Pass]) -> OnlineRow:
    task, way, server = key
    samples = [sample for made in passes for sample in made.samples]
    whole = _whole(samples)
    ttft = [_ttft_ms(sample) for sample in whole if sample.deltas_s]
    tokens = [sample.prompt_tokens for sample in whole if sample.prompt_tokens is not None]
    judged = [sample for sample in samples if sample.label]
    is_reply = task in (REPLY, REPLY_ALONE)
    return OnlineRow(
        task=task,
        way=way,
        server=server,
        rates=tuple(_rate(made.samples) for made in passes),
        requests=len(samples),
        errors=len(samples) - len(whole),
        ttft_p50_ms=_quantile(ttft, 0.5),
        ttft_p95_ms=_quantile(ttft, 0.95),
        e2e_p50_ms=_quantile([_e2e_ms(sample) for sample in whole], 0.5),
        prompt_tokens=sum(tokens) / len(tokens) if tokens else None,
        judged=len(judged),
        right=sum(sample.error is None and sample.text.strip() == sample.label for sample in judged),
        wrong_length=sum(s.completion_tokens not in (None, REPLY_TOKENS) for s in whole) if is_reply else 0,
        decode_share=_decode_share(passes),
    )


def _offline_row(key: tuple[str, str], parts: Sequence[OfflinePass]) -> OfflineRow:
    server, way = key
    good = [part for part in parts if part.error is None and part.wall_s > part.wall_one_s]
    return OfflineRow(
        server=server,
        way=way,
        rates=tuple((part.mails - 1) / (part.wall_s - part.wall_one_s) for part in good),
        judged=sum(part.mails for part in good),
        right=sum(part.right for part in good),
        error=next((part.error for part in parts if part.error), None),
    )


def _bare_row(one: BarePass) -> BareRow:
    ratios = tuple(bare / engine for bare, engine in zip(one.bare_s, one.engine_s, strict=True))
    return BareRow(task=one.task, ratios=ratios, tokens_per_s=one.tokens / median(one.engine_s))


def _talk_row(server: str, passes: Sequence[Pass]) -> TalkRow:
    samples = [sample for made in passes for sample in made.samples]
    whole = [sample for sample in _whole(samples) if sample.deltas_s]
    by_turn = {_turn(sample): [_ttft_ms(s) for s in whole if _turn(s) == _turn(sample)] for sample in samples}
    later = [[_ttft_ms(s) for s in _whole(made.samples) if s.deltas_s and _turn(s) > 1] for made in passes]
    read = sum(sample.prompt_tokens or 0 for sample in whole if _turn(sample) > 1)
    kept = sum(sample.cached_tokens or 0 for sample in whole if _turn(sample) > 1)
    return TalkRow(
        server=server,
        turns_ms=tuple(_quantile(by_turn[turn], 0.5) for turn in sorted(by_turn)),
        later_ms=tuple(median(part) for part in later if part),
        kept=kept / read if kept else None,
        requests=len(samples),
        errors=len(samples) - len(_whole(samples)),
    )


def _turn(sample: RequestSample) -> int:
    return person_and_turn(sample.id)[1]


def _prompt_row(key: tuple[str, str, str], timed: Sequence[PromptPass]) -> PromptRow:
    file, step, engine = key
    rates = tuple(one.tokens / seconds for one in timed for seconds in one.seconds)
    return PromptRow(file=file, step=step, engine=engine, rates=rates)


def _whole(samples: Sequence[RequestSample]) -> list[RequestSample]:
    return [sample for sample in samples if sample.error is None]


def _rate(samples: Sequence[RequestSample]) -> float:
    if not samples:
        return 0.0
    wall_s = max(s.finished_s for s in samples) - min(s.scheduled_s for s in samples)
    return len(_whole(samples)) / wall_s if wall_s > 0 else 0.0


def _e2e_ms(sample: RequestSample) -> float:
    return 1000 * (sample.finished_s - sample.scheduled_s)


def _ttft_ms(sample: RequestSample) -> float:
    return 1000 * (sample.deltas_s[0] - sample.scheduled_s)


def _quantile(values: Sequence[float], q: float) -> float | None:
    return quantile(values, q) if values else None


def _decode_share(passes: Sequence[Pass]) -> float | None:
    """llama_decode's part of the engine's step, from the server's own counters."""
    step = sum(made.counters.get(STEP, 0.0) for made in passes)
    decode = sum(made.counters.get(DECODE, 0.0) for made in passes)
    return decode / step if step > 0 and decode > 0 else None


def _hop_ms(passes: Sequence[Pass]) -> float | None:
    """The median over the repetitions of: p50 of the round trip - mean step time of a request."""
    hops = []
    for made in passes:
        trips = [_e2e_ms(sample) for sample in _whole(made.samples)]
        step_s = made.counters.get(STEP, 0.0)
        if trips and step_s > 0:
            hops.append(sum(trips) / len(trips) - 1000 * step_s / len(made.samples))
    return median(hops) if hops else None
