"""`deskside bench prefixes`: the bars from records built by hand, the report, and a small run between stand-ins."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.cli import create_app
from benchmarks.errors import BadWorkload, ServerFailed
from benchmarks.load.servers import RunningServer
from benchmarks.load.workload import LabelledExample
from benchmarks.peers.record import Server
from benchmarks.peers.servers import ServerPlan, installed_peers
from benchmarks.peers.tasks import DESKSIDE, LLAMA_SERVER
from benchmarks.record import load_record, save_json
from benchmarks.soak import prefixes
from benchmarks.soak.checks import (
    AT_THE_END,
    ENGINE_KILLED,
    ON_THE_WAY,
    OURS,
    SERVER_KILLED,
    THEIRS,
    MemoryPoint,
    PrefixRun,
    RoundsPass,
    TalkPass,
    bars,
    first_token_ms,
)
from benchmarks.soak.prefixes import PrefixInputs, PrefixSession, PrefixSettings, render_prefixes
from models.common.console import page
from tests.support.benchmarks.examples import sample
from tests.support.benchmarks.peer_examples import MACHINE, failed
from tests.support.benchmarks.stand_in import StandIn, running

MAILS = [LabelledExample(str(n), f"mail {n} says hello, and more {n} " * 20, "ham") for n in range(60)]
MIB = 1 << 20


def a_run(**changes: object) -> PrefixRun:
    facts = {"model": "m", "quantization": "Q8_0", "sha256": "0" * 64, "threads": 2, "workload": "mails", "peer": "ram"}
    facts |= {"people": 2, "turns": 3, "kill_after": 2, "repetitions": 1, "seed": 0, "quick": False}
    return PrefixRun.model_validate({"started_at": "2026-11-30", "machine": MACHINE, **facts, **changes})


def talk(name: str, *turns_s: tuple[float, float], ready_s: float | None = None) -> TalkPass:
    """Turns of two people, with the seconds to the first token of each."""
    samples = [
        sample(first=first).model_copy(update={"id": f"person {person}, turn {turn}"})
        for turn, both in enumerate(turns_s, 1)
        for person, first in enumerate(both, 1)
    ]
    return TalkPass(name=name, repetition=0, ready_s=ready_s, samples=tuple(samples))


def rounds(*seconds: float) -> RoundsPass:
    gauges = ({"deskside_snapshots_restored_total": 1.0}, {"deskside_snapshots_restored_total": 4.0})
    return RoundsPass(
        flags="default settings",
        rounds=tuple((sample(finish=finish), sample(1)) for finish in seconds),
        gauges=gauges,
        disk_bytes=3 * MIB,
    )


def points(early_mib: int, late_mib: int, late_snapshots_mib: int = 0) -> tuple[MemoryPoint, ...]:
    early = MemoryPoint(when=ON_THE_WAY, requests=400, tree_bytes=early_mib * MIB, snapshot_bytes=0)
    snapshots = late_snapshots_mib * MIB
    late = MemoryPoint(when=AT_THE_END, requests=2000, tree_bytes=late_mib * MIB, snapshot_bytes=snapshots)
    return early, late


TALKS = (
    talk(OURS, (0.9, 0.9), (0.4, 0.5), (0.2, 0.3)),
    talk(ENGINE_KILLED, (0.9, 0.9), (0.4, 0.5), (1.2, 0.7), ready_s=1.5),
    talk(SERVER_KILLED, (0.9, 0.9), (0.4, 0.5), (0.3, 0.4), ready_s=2.5),
    talk(THEIRS, (0.8, 0.8), (0.5, 0.6), (0.6, 0.5)),
)


def test_first_tokens_are_those_of_the_turns_asked_for() -> None:
    run = a_run(talks=TALKS)
    assert first_token_ms(run, OURS, 1) == pytest.approx([400, 500, 200, 300])
    assert first_token_ms(run, OURS, 0, 1) == pytest.approx([900, 900])


def test_conversations_are_judged_by_medians_of_the_turns_after_the_kill() -> None:
    found = {bar.name: (bar.passed, bar.found) for bar in bars(a_run(talks=TALKS))}
    assert found == {
        "Deskside, no restart: first token after turn 1 no later than llama-server's":
            (True, "350 ms (worst 500), 550 ms (worst 600)"),
        "Deskside, engine killed: first token after turn 2 no later than llama-server's":
            (False, "950 ms (worst 1200), 550 ms (worst 600)"),
        "Deskside, server killed: first token after turn 2 no later than llama-server's":
            (True, "350 ms (worst 400), 550 ms (worst 600)"),
    }  # fmt: skip


def test_without_llama_server_the_bar_is_not_measured_and_says_why() -> None:
    found = bars(a_run(talks=TALKS[:3], peer="llama-server is not in 'x'"))
    assert {(bar.passed, bar.found) for bar in found} == {(None, "llama-server is not in 'x'")}


def test_a_failed_turn_misses_the_bar() -> None:
    [first, *rest] = TALKS[0].samples
    lost = TALKS[0].model_copy(update={"samples": (failed(first), *rest)})
    run = a_run(talks=(lost, TALKS[3]))
    assert run.failed == 1
    bar = bars(run)[0]
    assert (bar.passed, bar.found[-10:]) == (False, "; 1 failed")


@pytest.mark.parametrize(("second", "passed"), [(1.0, True), (1.1, False)])
def test_rounds_are_judged_by_wall_time(second: float, passed: bool) -> None:
    [bar] = bars(a_run(rounds=(rounds(10.0, second),)))
    assert bar.passed is passed
    assert bar.name == "default settings: second round of 2 few-shot prompts ≥ 10 times as fast"
    assert bar.found.endswith("50% of the tokens kept, 3 prefixes restored, 0 of them from disk")


@pytest.mark.parametrize(
    ("memory", "passed"),
    [
        (points(100, 116), [True, True]),
        (points(100, 117), [False, False]),
        (points(400, 420), [True, True]),
        (points(100, 300, late_snapshots_mib=190), [False, True]),
        (points(0, 0), [None, None]),
        (points(100, 117)[:1], []),
    ],
)
def test_memory_may_grow_by_a_twentieth_or_16_mib(memory: tuple[MemoryPoint, ...], passed: list[bool | None]) -> None:
    assert [bar.passed for bar in bars(a_run(memory=memory))] == passed


def test_the_report_has_every_figure_and_is_shown_again_from_the_file(tmp_path: Path) -> None:
    run = a_run(talks=TALKS, rounds=(rounds(10.0, 1.0),), memory=points(100, 300, 190), quick=True)
    save_json(tmp_path / "run.json", run.model_dump(mode="json"))
    again = ["prefixes", "--report", str(tmp_path / "run.json")]
    shown = CliRunner().invoke(create_app(), again, catch_exceptions=False)
    assert shown.exit_code == 0
    for text in ("missed: Deskside, engine killed", "1200", "2.5 s", "3 MiB", "190 MiB", "2,000", "--quick"):
        assert text in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    found = json.loads(CliRunner().invoke(create_app(), [*again, "--json"]).stdout)
    assert [bar["passed"] for bar in found["bars"]] == [True, False, True, True, False, True]
    assert "talks" not in found


def test_quick_changes_only_what_was_not_given() -> None:
    settings = PrefixSettings(quick=True, people=9).effective()
    assert (settings.people, settings.turns, settings.repetitions) == (9, 3, 1)
    assert PrefixSettings().effective() == PrefixSettings()


def test_a_kill_after_the_last_turn_is_refused() -> None:
    with pytest.raises(BadWorkload, match="--kill-after 4 leaves no turn of 4"):
        prefixes._measured(PrefixSettings(kill_after=4), lambda *_: None)


def test_peers_that_are_not_installed_are_not_used(tmp_path: Path) -> None:
    assert installed_peers(tmp_path) is None
    (tmp_path / ".ready").write_text("another lock file")
    assert installed_peers(tmp_path) is None


def plan_of(peer: str, start: Callable[[Path], AbstractContextManager[RunningServer]]) -> ServerPlan:
    facts = Server(name=peer, profile="", settings="", quantization="Q8_0", size_bytes=1, sha256="0" * 64)
    return ServerPlan(facts, peer, start)


class Places:
    """Plans of stand-ins. A server's process is one that sleeps; flags and processes are kept."""

    def __init__(self, ours: str, theirs: str) -> None:
        self._addresses = {DESKSIDE: ours, LLAMA_SERVER: theirs}
        self.flags: list[tuple[str, ...]] = []
        self.exits: list[int] = []

    def ours(self, flags: Sequence[str]) -> ServerPlan:
        self.flags.append(tuple(flags))
        return self.plan(DESKSIDE)

    def plan(self, peer: str) -> ServerPlan:
        @contextmanager
        def start(log: Path) -> Iterator[RunningServer]:
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            try:
                yield RunningServer(self._addresses[peer], 0.1, process.pid)
            finally:
                process.terminate()
                self.exits.append(process.wait())

        return plan_of(peer, start)


def test_a_small_run_between_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []

    def kill(pid: int) -> int:
        killed.append(pid)
        return pid

    monkeypatch.setattr(prefixes, "kill_engine", kill)
    ours, theirs = StandIn(lambda prompt: "ja"), StandIn(lambda prompt: "no")
    settings = PrefixSettings(people=2, turns=3, kill_after=1, prompts=3, requests=10, repetitions=2)
    out = tmp_path / "results" / "run.json"
    run = a_run(kill_after=1, repetitions=2)
    with running(ours) as first, running(theirs) as second:
        places = Places(first, second)
        inputs = PrefixInputs(places.ours, places.plan(LLAMA_SERVER), MAILS, tmp_path)
        session = PrefixSession(settings, run, out, inputs)
        session.idle_s = (0.0, 0.0)
        for stage in (session.talk, session.ask_twice, session.fill):
            stage(lambda *_: None)
    run = load_record(out, PrefixRun, "is no run")
    assert run == session.run
    assert run.failed == 0
    order = [OURS, ENGINE_KILLED, SERVER_KILLED, THEIRS]
    assert [made.name for made in run.talks] == [*order, *reversed(order)]
    assert [made.ready_s is not None for made in run.talks[:4]] == [False, True, True, False]
    assert len(killed) == 2
    assert places.exits.count(-9) == 2
    # The answers before a kill go back after it.
    later = [body["messages"] for body in ours.bodies if len(body["messages"]) == 5]
    assert len(later) == 2 * 3 * 2
    assert {message["content"] for said in later for message in said if message["role"] == "assistant"} == {"ja"}
    assert [len(made.rounds[0]) for made in run.rounds] == [3, 3, 3]
    for made in run.rounds:
        assert [s.id for s in made.rounds[0]] == [s.id for s in made.rounds[1]]
    assert [point.requests for point in run.memory] == [0, 2, 10, 10, 10]
    assert all(point.tree_bytes > 0 for point in run.memory) or sys.platform != "linux"
    folders = [flags[1] for flags in places.flags if flags[:1] == ("--prefix-disk",)]
    assert len(set(folders)) == len(folders) == 2 * 2 + 1, "every pass has a folder of its own"
    render_prefixes(run, page())


def test_a_server_without_an_engine_of_its_own_cannot_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    # a process of its own: this one may have children of other tests
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as childless:
        with pytest.raises(ServerFailed, match="no engine process"):
            prefixes._kill_engine(RunningServer("http://127.0.0.1:9/v1", 0.1, childless.pid))
        childless.kill()
