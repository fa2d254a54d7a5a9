"""The figures and the verdict of a comparison, from samples made by hand."""

import io

import pytest
from rich.console import Console

from benchmarks.peers.aims import PeerAim, judge
from benchmarks.peers.figures import figures_of, ratio
from benchmarks.peers.record import BarePass, Pass, PeerRun, PromptPass
from benchmarks.peers.report import render_peers
from benchmarks.peers.tasks import (
    BURST,
    CHAT,
    COMPLETION,
    CONSTRAINED,
    CONVERSATIONS,
    DECISIONS,
    HOP,
    IK_LLAMA,
    LABEL,
    LABEL_ALONE,
    REPLY,
)
from tests.support.benchmarks.examples import sample
from tests.support.benchmarks.peer_examples import failed, made, offline, peer_run

OURS, BEST, BEST_BASE = "deskside, chosen", "llama-server unified, chosen", "llama-server split, base Q4_K_M"
SPLIT, SHIPPED = "llama-server split, chosen", "llama-server as shipped, chosen"
PYTHON, BASE = "llama_cpp.server best, chosen", "deskside, base Q4_K_M"


def aims(run: PeerRun) -> dict[str, PeerAim]:
    return {aim.name.split(" (")[0].split(",")[0]: aim for aim in judge(figures_of(run))}


def shown(run: PeerRun) -> str:
    """The report of the run."""
    figures = figures_of(run)
    out = io.StringIO()
    render_peers(run, figures, judge(figures), Console(file=out, width=200))
    return out.getvalue()


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
        made(LABEL, CONSTRAINED, BEST, 1.4),
    )
    found = aims(run)["labels of the same file"]
    assert found.name == "labels of the same file (chosen decisions / unified constrained)"
    assert (found.verdict, found.found) == ("met", "1.40 [1.40, 1.40]")


def test_each_row_has_its_own_best_peer_by_its_median() -> None:
    run = peer_run(
        *(made(task, CHAT, OURS, 1.0, repetition=n) for task in (LABEL, REPLY) for n in range(3)),
        *(made(LABEL, CONSTRAINED, OURS, 1.0, repetition=n) for n in range(3)),
        # split has the fastest pass, unified the better median
        *(made(LABEL, CHAT, SPLIT, seconds, repetition=n) for n, seconds in enumerate((1.0, 1.9, 1.9))),
        *(made(LABEL, CHAT, BEST, seconds, repetition=n) for n, seconds in enumerate((1.8, 1.8, 1.8))),
        *(made(REPLY, CHAT, SPLIT, 1.3, 2.6, repetition=n) for n in range(3)),
        *(made(REPLY, CHAT, BEST, 1.6, 3.2, repetition=n) for n in range(3)),
        made(REPLY, CHAT, SHIPPED, 0.1),  # answers fewer requests in a pass
        made(REPLY, CHAT, "llama-server split, Q4_K_M", 0.1, 0.2),  # another file
    )
    found = {aim.name: aim for aim in judge(figures_of(run))}
    labels = found["labels of the same file (chosen constrained / unified chat)"]
    replies = found["replies of the same file (chosen chat / split chat)"]
    assert (labels.wanted, labels.found, labels.verdict) == ("≥ 1.3, aim 1.7", "1.80 [1.80, 1.80]", "aim met")
    assert (replies.wanted, replies.found, replies.verdict) == ("≥ 1.25, aim 1.5", "1.30 [1.30, 1.30]", "met")


@pytest.mark.parametrize(("seconds", "verdict"), [(1.29, "missed"), (1.31, "met"), (1.81, "aim met")])
def test_one_clients_labels_have_a_bound_and_an_aim(seconds: float, verdict: str) -> None:
    run = peer_run(made(LABEL_ALONE, DECISIONS, OURS, 1.0), made(LABEL_ALONE, CHAT, SPLIT, seconds))
    assert aims(run)["one client's labels"].verdict == verdict


@pytest.mark.parametrize(("seconds", "verdict"), [(3.1, "met"), (2.9, "missed")])
def test_the_cold_burst_needs_three_times(seconds: float, verdict: str) -> None:
    run = peer_run(made(BURST, COMPLETION, BASE, 1.0), made(BURST, COMPLETION, BEST_BASE, seconds))
    assert aims(run)["cold burst"].verdict == verdict


def test_ttft_must_be_no_worse_in_any_task() -> None:
    good = (made(LABEL, CHAT, OURS, 1.0, first=0.1), made(LABEL, CHAT, BEST, 1.0, first=0.2))
    worse = (made(REPLY, CHAT, OURS, 1.0, first=0.3), made(REPLY, CHAT, BEST, 1.0, first=0.2))
    assert aims(peer_run(*good))["TTFT p50 over llama-server's"].verdict == "met"
    found = aims(peer_run(*good, *worse))["TTFT p50 over llama-server's"]
    assert found.verdict == "missed"
    assert found.found == "1.50 (64-token reply, chat); above 1 in 1 of 2"


def talk(server: str, *firsts: tuple[float, ...], repetition: int = 0) -> Pass:
    """A pass of conversations: for each turn the seconds to everybody's first token."""
    samples = tuple(
        sample(first=first, finish=first + 1).model_copy(update={"id": f"person {person}, turn {turn}"})
        for turn, people in enumerate(firsts, 1)
        for person, first in enumerate(people, 1)
    )
    return Pass(
        task=CONVERSATIONS, way=CHAT, server=server, repetition=repetition, users=1, counters={}, samples=samples
    )


def test_conversations_count_by_the_first_tokens_of_later_turns() -> None:
    run = peer_run(
        talk(OURS, (9.0, 9.0), (0.2, 0.4), (0.3, 0.3)),
        talk(OURS, (9.0, 9.0), (0.4, 0.4), (0.4, 0.4), repetition=1),
        talk(BEST, (0.1, 0.1), (0.5, 0.5), (0.5, 0.5)),
        talk(SPLIT, (0.1, 0.1), (0.3, 0.3), (0.5, 0.5)),
        talk(SPLIT, (0.1, 0.1), (0.3, 0.3), (0.3, 0.3), repetition=1),
    )
    figures = figures_of(run)
    assert not figures.rows, "requests per second say nothing of them"
    ours, _, split = figures.talks
    assert ours.turns_ms == pytest.approx((9000, 400, 350))
    assert ours.later_ms == pytest.approx((300, 400))
    assert split.later_ms == pytest.approx((400, 300))
    assert (ours.requests, ours.errors, ours.kept) == (12, 0, 0.5)
    found = next(aim for aim in judge(figures) if aim.name.startswith("conversations"))
    assert found.name == "conversations, first token of later turns (split): theirs / ours"
    assert (found.found, found.verdict) == ("1.00 [0.75, 1.33]", "met")


def test_a_turn_that_nobody_answered_has_no_time() -> None:
    silent = talk(OURS, (0.1,), (0.2,))
    one = silent.model_copy(update={"samples": tuple(failed(sample) for sample in silent.samples)})
    (row,) = figures_of(peer_run(one)).talks
    assert (row.turns_ms, row.later_ms, row.kept, row.errors) == ((None, None), (), None, 2)
    assert aims(peer_run(one, talk(BEST, (0.1,), (0.2,))))["conversations"].verdict == "not measured"
    assert "2 of 2" in shown(peer_run(one))


def timed(engine: str, file: str, step: str, *seconds: float) -> PromptPass:
    return PromptPass(file=file, step=step, engine=engine, tokens=100, repetition=0, seconds=seconds)


def test_prompts_count_by_the_step_that_is_slowest_beside_ik_llama() -> None:
    prompts = (
        timed("deskside, --prefill stock", "chosen", "one prompt", 2.0, 2.0),
        timed("deskside, --prefill auto", "chosen", "one prompt", 1.0, 1.0),
        timed(IK_LLAMA, "chosen", "one prompt", 1.1, 1.3),
        timed("deskside, --prefill auto", "Q4_K_M", "one prompt", 1.0, 1.0),
        timed(IK_LLAMA, "Q4_K_M", "one prompt", 0.8, 0.8),
    )
    run = peer_run().model_copy(update={"prompts": prompts})
    assert figures_of(run).prompts[1].rate == 100.0
    found = aims(run)["prompts / ik_llama.cpp"]
    assert found.name == "prompts / ik_llama.cpp, least (Q4_K_M, one prompt)"
    assert (found.found, found.verdict) == ("0.80 [0.80, 0.80]", "missed")
    better = run.model_copy(update={"prompts": prompts[:3]})
    assert aims(better)["prompts / ik_llama.cpp"].verdict == "met"
    assert "repacks weights at load" in shown(run)


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
    text = shown(run)
    assert "test cpu (AVX2), 2 logical cores" in text
    assert "llama.cpp built for: llama-server (xllamacpp) AVX2" in text
    assert "label, chat: requests per second; best of llama-server: unified" in text
    for piece in (OURS, BEST, "2.00 [2.00, 2.00]", "[1.00, 1.00]", "AVX2 = 1", "--quick", "not measured", "14.29"):
        assert piece in text
    assert f"{OURS}: 16 slots; Q8_0, sha256 000000000000…, 1 MiB" in text, "the name says no quantization"
