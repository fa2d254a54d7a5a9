"""The figures and the verdict of a comparison, from samples made by hand."""

import io

import pytest
from rich.console import Console

from benchmarks.peers.aims import PeerAim, judge
from benchmarks.peers.figures import figures_of, ratio
from benchmarks.peers.record import BarePass, Pass, PeerRun
from benchmarks.peers.report import render_peers
from benchmarks.peers.tasks import BURST, CHAT, COMPLETION, CONSTRAINED, DECISIONS, HOP, LABEL, REPLY
from tests.support.benchmarks.peer_examples import failed, made, offline, peer_run

OURS, BEST, BEST_BASE = "deskside, chosen", "llama-server best, chosen", "llama-server best, base Q4_K_M"
PYTHON, BASE = "llama_cpp.server best, chosen", "deskside, base Q4_K_M"


def aims(run: PeerRun) -> dict[str, PeerAim]:
    return {aim.name.split(" (")[0].split(",")[0]: aim for aim in judge(figures_of(run))}


def test_a_rate_is_whole_answers_over_the_time_to_the_last() -> None:
    one = made(LABEL, CHAT, OURS, 1.0, 2.0, 4.0)
    spoiled = one.model_copy(update={"samples": (failed(one.samples[0]), *one.samples[1:])})
    assert figures_of(peer_run(one)).rows[0].rate == pytest.approx(3 / 4)
    row = figures_of(peer_run(spoiled)).rows[0]
    assert row.rate == pytest.approx(2 / 4)
    assert (row.errors, row.right, row.judged) == (1, 2, 3)


def test_a_ratio_is_of_medians_with_the_range_of_the_repetitions() -> None:
    ours = [made(LABEL, CHAT, OURS, seconds, repetition=r) for r, seconds in enumerate((1.0, 2.0, 4.0))]
    theirs = [made(LABEL, CHAT, BEST, seconds, repetition=r) for r, seconds in enumerate((2.0, 2.0, 2.0))]
    figures = figures_of(peer_run(*ours, *theirs))
    found = ratio(figures.row(LABEL, CHAT, OURS), figures.row(LABEL, CHAT, BEST))
    assert found is not None
    assert [found.value, found.low, found.high] == pytest.approx([1.0, 0.5, 2.0])
    assert ratio(figures.row(LABEL, CHAT, OURS), figures.row(LABEL, CHAT, PYTHON)) is None


def test_ttft_is_pooled_over_the_repetitions() -> None:
    passes = [made(LABEL, CHAT, OURS, 1.0, first=first, repetition=r) for r, first in enumerate((0.1, 0.2, 0.3))]
    row = figures_of(peer_run(*passes)).rows[0]
    assert row.ttft_p50_ms == pytest.approx(200)
    assert row.ttft_p95_ms == pytest.approx(290)


def test_replies_of_another_length_are_counted() -> None:
    row = figures_of(peer_run(made(REPLY, CHAT, OURS, 1.0, 2.0))).rows[0]
    assert row.wrong_length == 2  # the samples have three tokens, not 64


def test_labels_are_compared_in_each_sides_fastest_way() -> None:
    run = peer_run(
        made(LABEL, CHAT, OURS, 0.1),  # plain chat does not count for ours: the aim is decisions or choice
        made(LABEL, CONSTRAINED, OURS, 2.0),
        made(LABEL, DECISIONS, OURS, 1.0),
        made(LABEL, CHAT, BEST, 3.0),
        made(LABEL, CONSTRAINED, BEST, 1.2),
    )
    found = aims(run)["labels through decisions or choice"]
    assert (found.verdict, found.found) == ("met", "1.20 [1.20, 1.20]")


@pytest.mark.parametrize(("seconds", "verdict"), [(2.6, "met"), (2.4, "missed")])
def test_the_cold_burst_needs_two_and_a_half(seconds: float, verdict: str) -> None:
    run = peer_run(made(BURST, COMPLETION, BASE, 1.0), made(BURST, COMPLETION, BEST_BASE, seconds))
    assert aims(run)["cold burst"].verdict == verdict


def test_ttft_must_be_no_worse_in_any_task() -> None:
    good = (made(LABEL, CHAT, OURS, 1.0, first=0.1), made(LABEL, CHAT, BEST, 1.0, first=0.2))
    worse = (made(REPLY, CHAT, OURS, 1.0, first=0.3), made(REPLY, CHAT, BEST, 1.0, first=0.2))
    assert aims(peer_run(*good))["TTFT p50 over llama-server's"].verdict == "met"
    found = aims(peer_run(*good, *worse))["TTFT p50 over llama-server's"]
    assert found.verdict == "missed"
    assert found.found == "1.50 (64-token reply, chat); above 1 in 1 of 2"


def test_offline_is_compared_without_start_and_load() -> None:
    parts = (
        offline("deskside", DECISIONS, 12.0),
        offline("deskside", CHAT, 0.0, error="no such url"),
        offline("ctranslate2 int8", "in order of arrival", 27.0),
        offline("ctranslate2 int8", "sorted by length", 22.0),
    )
    figures = figures_of(peer_run(offline=parts))
    assert [row.rate for row in figures.offline] == [10.0, 0.0, 4.0, 5.0]
    assert aims(peer_run(offline=parts))["offline mails/s / CTranslate2 int8"].found.startswith("2.00")


def engine(task: str, step: float, decode: float, *seconds: float) -> Pass:
    counters = {"deskside_step_seconds_total": step, "deskside_decode_seconds_total": decode}
    return made(task, CHAT, OURS, *seconds, counters=counters)


def test_the_hop_is_the_round_trip_less_the_engines_step() -> None:
    run = peer_run(engine(HOP, 0.06, 0.05, 0.02, 0.024, 0.028))
    figures = figures_of(run)
    assert figures.hop_ms == pytest.approx(4.0)
    assert figures.round_trip_ms == pytest.approx(24)
    assert aims(run)["HTTP and process"].verdict == "met"


def test_the_engine_beside_a_bare_loop_counts_by_its_slowest_task() -> None:
    label = BarePass(task=LABEL, tokens=100, decodes=9, engine_s=(10.0, 10.0, 10.0), bare_s=(9.8, 9.9, 9.7))
    reply = BarePass(task=REPLY, tokens=100, decodes=9, engine_s=(10.0, 10.0, 10.0), bare_s=(9.5, 9.6, 9.4))
    run = peer_run().model_copy(update={"bare": (label, reply)})
    assert [row.tokens_per_s for row in figures_of(run).bare] == [10.0, 10.0]
    found = aims(run)["engine tokens/s over a bare llama_decode loop with the same batches"]
    assert (found.found, found.verdict) == ("0.950 [0.940, 0.960] (64-token reply)", "missed")
    better = run.model_copy(update={"bare": (label,)})
    assert aims(better)["engine tokens/s over a bare llama_decode loop with the same batches"].verdict == "met"


def test_the_chosen_file_is_compared_with_the_plain_conversion_on_our_own_server() -> None:
    plain = "deskside, Q4_K_M"
    run = peer_run(
        *(made(task, way, server, seconds) for task, way in ((LABEL, DECISIONS), (REPLY, CHAT))
          for server, seconds in ((OURS, 1.0), (plain, 1.6)))
    )  # fmt: skip
    for aim in ("decisions", "replies"):
        found = aims(run)[aim]
        assert (found.found, found.verdict) == ("1.60 [1.60, 1.60]", "met")


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert {aim.verdict for aim in judge(figures_of(peer_run()))} == {"not measured"}


def test_the_report_shows_every_row_and_aim() -> None:
    run = peer_run(made(LABEL, CHAT, OURS, 1.0), made(LABEL, CHAT, BEST, 2.0), offline=(offline("deskside", CHAT, 9),))
    figures = figures_of(run)
    out = io.StringIO()
    render_peers(run, figures, judge(figures), Console(file=out, width=200))
    text = out.getvalue()
    for piece in (OURS, BEST, "2.00 [2.00, 2.00]", "[1.00, 1.00]", "AVX2 = 1", "--quick", "not measured", "14.29"):
        assert piece in text
    assert f"{OURS}: 16 slots; Q8_0, sha256 000000000000…, 1 MiB" in text, "the name says no quantization"
