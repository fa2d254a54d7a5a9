"""Conversations in turn: their texts, what is sent back with each turn, and a whole stage between stand-ins."""

import asyncio
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.errors import BadWorkload
from benchmarks.load.servers import RunningServer
from benchmarks.load.workload import (
    LabelledExample,
    PromptTemplate,
    Talks,
    conversation_cells,
    conversation_turns,
    person_and_turn,
)
from benchmarks.peers.figures import figures_of
from benchmarks.peers.plan import deal_examples
from benchmarks.peers.record import PeerSettings
from benchmarks.peers.run import PeerRunFile, PeerSession, PeerWorkload, Stage, run_stage
from benchmarks.peers.servers import ServerPlan
from benchmarks.peers.tasks import CHAT, CONVERSATIONS, DESKSIDE, LLAMA_SERVER, asking, tasks
from benchmarks.record import RequestSample
from tests.support.benchmarks.examples import sample
from tests.support.benchmarks.peer_examples import peer_run
from tests.support.benchmarks.stand_in import StandIn, running

from .test_tasks import plan

MAILS = [LabelledExample(str(n), f"mail {n} says hello, and more {n}", "ham") for n in range(60)]


def test_everybody_has_a_turn_before_anybody_has_the_next() -> None:
    turns = conversation_turns(MAILS, people=3, turns=2, chars=100)
    assert [person_and_turn(turn.id) for turn in turns] == [
        *(("person 1", 1), ("person 2", 1), ("person 3", 1)),
        *(("person 1", 2), ("person 2", 2), ("person 3", 2)),
    ]
    assert {len(turn.text) for turn in turns} == {100}
    assert len({turn.text for turn in turns}) == 6
    assert turns == conversation_turns(MAILS, people=3, turns=2, chars=100)
    with pytest.raises(BadWorkload, match=r"30 people with 2 turns need 60 different texts.*--people or --turns"):
        conversation_turns(MAILS, people=30, turns=2, chars=100)


@pytest.mark.parametrize("settings", [PeerSettings(), PeerSettings(quick=True).effective()])
def test_the_default_models_mails_suffice(settings: PeerSettings) -> None:
    _, slices, _, _ = deal_examples(settings)
    parts = slices[CONVERSATIONS, CHAT]
    assert len(parts) == settings.repetitions
    people = Counter(person_and_turn(turn.id)[0] for turn in parts[0])
    assert (len(people), set(people.values())) == (settings.people, {settings.turns})


def test_a_slot_holds_a_whole_conversation() -> None:
    assert [conversation_cells(turns) for turns in (2, 4, 8)] == [2048, 4096, 7168]


def test_a_turn_is_sent_after_all_that_was_said() -> None:
    asked: list[list[dict[str, str]]] = []

    async def chat(example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        asked.append(fields["messages"])
        error = "HTTP 500" if prompt == "third" else None
        return sample(text="" if error else prompt.upper(), error=error)

    async def converse() -> None:
        talks = Talks(chat)
        for turn, person, text in ((1, 1, "first"), (1, 2, "other"), (2, 1, "third"), (3, 1, "last")):
            await talks.turn(LabelledExample(f"person {person}, turn {turn}", text, ""), text, 0.0, max_tokens=3)

    asyncio.run(converse())
    assert [[message["content"] for message in said] for said in asked] == [
        ["first"], ["other"], ["first", "FIRST", "third"], ["first", "FIRST", "third", "", "last"],
    ]  # fmt: skip
    assert [message["role"] for message in asked[-1]] == ["user", "assistant", "user", "assistant", "user"]


def test_answers_have_a_fixed_length() -> None:
    assert asking(CONVERSATIONS, CHAT, LLAMA_SERVER, ()) == (
        "chat",
        {"temperature": 0, "max_tokens": 24, "ignore_eos": True},
    )


def test_a_stage_asks_one_at_a_time_and_sends_the_servers_own_answers_back(tmp_path: Path) -> None:
    ours, theirs = StandIn(lambda prompt: prompt[:6]), StandIn(lambda prompt: "ja")
    turns = conversation_turns(MAILS, people=2, turns=3, chars=100)
    with running(ours) as first, running(theirs) as second:
        servers = tuple(
            ServerPlan(one.facts, one.peer, lambda log, url=url: nullcontext(RunningServer(url, 0.1)))  # type: ignore[misc]
            for one, url in ((plan("deskside, chosen", DESKSIDE), first), (plan("llama-server ram, chosen"), second))
        )
        work = [(tasks(8)[CONVERSATIONS], frozenset(server.name for server in servers))]
        stage = Stage(servers, work, PromptTemplate("bare"), (), cold=True)
        workload = PeerWorkload({(CONVERSATIONS, CHAT): [turns] * 2}, ("ham",), 2)
        session = PeerSession(workload, PeerRunFile(peer_run(), tmp_path / "run.json"), lambda *_: None)
        run_stage(stage, session)
    assert len(session.file.run.passes) == 4
    assert {made.users for made in session.file.run.passes} == {1}
    for server, answer in ((ours, turns[2].text[:6]), (theirs, "ja")):
        assert len(server.bodies) == 12
        messages = server.bodies[4]["messages"]
        assert [message["content"] for message in messages[2:]] == [turns[2].text, answer, turns[4].text]
    rows = figures_of(session.file.run).talks
    assert [(row.server, len(row.turns_ms), len(row.later_ms), row.errors) for row in rows] == [
        ("deskside, chosen", 3, 2, 0),
        ("llama-server ram, chosen", 3, 2, 0),
    ]
