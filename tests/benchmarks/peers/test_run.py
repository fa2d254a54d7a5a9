"""A comparison of stand-in servers: interleaved, saved after each pass, shown again from its file."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.cli import create_app
from benchmarks.errors import ServerFailed
from benchmarks.load.servers import RunningServer
from benchmarks.load.workload import LabelledExample, PromptTemplate
from benchmarks.peers.record import load_peer_run
from benchmarks.peers.run import PeerRunFile, PeerSession, PeerWorkload, Stage, planned_passes, run_stage
from benchmarks.peers.servers import ServerPlan
from benchmarks.peers.tasks import BURST, COMPLETION, DECISIONS, DESKSIDE, LABEL, LLAMA_SERVER, deal, tasks
from tests.support.benchmarks.peer_examples import peer_run
from tests.support.benchmarks.stand_in import StandIn, running

from .test_tasks import plan

LABELS = ("ham", "spam")
POOL = [LabelledExample(str(n), f"buy {n}" if n % 2 else f"hello {n}", "spam" if n % 2 else "ham") for n in range(60)]


class Both:
    """Two stand-ins: ours is always right, the peer says spam to everything."""

    def __init__(self, ours: str, theirs: str) -> None:
        self.plans = (started(plan("deskside, Q8_0", DESKSIDE), ours), started(plan("peer", LLAMA_SERVER), theirs))

    def stage(self, task: str, *, cold: bool = False, warmup: tuple[LabelledExample, ...] = ()) -> Stage:
        names = frozenset(server.name for server in self.plans)
        return Stage(self.plans, [(tasks(8)[task], names)], PromptTemplate("bare"), warmup, cold=cold)


def started(server: ServerPlan, url: str) -> ServerPlan:
    return ServerPlan(server.facts, server.peer, lambda log: nullcontext(RunningServer(url, 0.1)))


@pytest.fixture
def both() -> Iterator[Both]:
    ours, theirs = StandIn(lambda prompt: "spam" if "buy" in prompt else "ham"), StandIn(lambda prompt: "spam")
    with running(ours) as first, running(theirs) as second:
        yield Both(first, second)


def session(task: str, out: Path) -> PeerSession:
    ways = tasks(8)[task].ways
    dealt = deal(POOL, dict.fromkeys(ways, (2, 8)), seed=0)
    workload = PeerWorkload({(task, way): dealt[way] for way in ways}, LABELS, 2)
    return PeerSession(workload, PeerRunFile(peer_run(), out), lambda *_: None)


def test_a_stage_is_measured_and_saved(both: Both, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    measured = session(LABEL, out)
    run_stage(both.stage(LABEL, warmup=tuple(POOL[:2])), measured)
    run = load_peer_run(out)
    assert run == measured.file.run
    assert [server.name for server in run.servers] == ["deskside, Q8_0", "peer"]
    assert len(run.passes) == 2 * (2 + 2 + 1)
    for made in run.passes:
        assert len(made.samples) == 8
        assert [sample.error for sample in made.samples] == [None] * 8
        right = sum(sample.text == sample.label for sample in made.samples)
        assert right == (8 if made.server != "peer" else sum(s.label == "spam" for s in made.samples))
        # Only our server's own counters are read: before and after each pass.
        assert made.counters == ({} if made.server == "peer" else {"deskside_steps_total": 2.0})
    assert {made.server for made in run.passes if made.way == DECISIONS} == {"deskside, Q8_0"}
    # Both sides of a pass were asked the same, and nobody anything twice.
    first, second = (made for made in run.passes if (made.way, made.repetition) == ("chat", 0))
    assert [s.id for s in first.samples] == [s.id for s in second.samples]
    asked = [s.id for made in run.passes if made.server != "peer" for s in made.samples]
    assert len(asked) == len(set(asked))


def test_a_cold_server_is_started_for_each_pass(both: Both, tmp_path: Path) -> None:
    measured = session(BURST, tmp_path / "run.json")
    run_stage(both.stage(BURST, cold=True), measured)
    assert [server.name for server in measured.file.run.servers] == ["deskside, Q8_0", "peer", "peer", "deskside, Q8_0"]
    assert {(made.task, made.way, made.users) for made in measured.file.run.passes} == {(BURST, COMPLETION, 8)}


def test_a_cold_burst_is_repeated_at_most_twice(both: Both) -> None:
    many = PeerWorkload({}, LABELS, 5)
    assert [one.repetition for one in planned_passes(both.stage(BURST, cold=True), many)] == [0, 0, 1, 1]
    assert {one.repetition for one in planned_passes(both.stage(LABEL), many)} == {0, 1, 2, 3, 4}


def test_a_server_that_fails_its_warm_up_stops_the_run(both: Both, tmp_path: Path) -> None:
    stage = both.stage(LABEL, warmup=(LabelledExample("w", "HTTP500", "ham"),))
    with pytest.raises(ServerFailed, match=r"label, chat: deskside.*warm-up failed.*500"):
        run_stage(stage, session(LABEL, tmp_path / "run.json"))


def test_a_run_is_shown_again_from_its_file(both: Both, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    run_stage(both.stage(LABEL), session(LABEL, out))
    shown = CliRunner().invoke(create_app(), ["peers", "--report", str(out)], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "deskside, Q8_0" in shown.output
    assert "16 of 16" in shown.output
