"""The requests to the peers: fields for each, disjoint slices of the same length, prompts, and the order of passes."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks.errors import BadWorkload
from benchmarks.load.servers import RunningServer, read_counters
from benchmarks.load.workload import LabelledExample, PromptTemplate, long_prompts
from benchmarks.peers.offline import batch_answers, batch_lines
from benchmarks.peers.plan import deal_examples
from benchmarks.peers.record import PeerSettings, Server
from benchmarks.peers.run import PeerWorkload, Stage, planned_passes
from benchmarks.peers.servers import ServerPlan, without
from benchmarks.peers.tasks import (
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
    asking,
    deal,
    gbnf,
    tasks,
)

LABELS = ("ham", "spam")
POOL = [LabelledExample(str(n), "x" * (n * n % 97 + 1), "ham") for n in range(60)]


def test_each_server_is_asked_for_the_same_thing_in_its_own_words() -> None:
    ours, theirs = (asking(LABEL, CONSTRAINED, peer, LABELS) for peer in (DESKSIDE, LLAMA_SERVER))
    assert ours == ("chat", {"temperature": 0, "max_tokens": 12, "choice": ["ham", "spam"]})
    assert theirs == ("chat", {"temperature": 0, "max_tokens": 12, "grammar": 'root ::= "ham" | "spam"'})
    assert asking(LABEL, DECISIONS, LLAMA_SERVER, LABELS) is None
    for peer in (DESKSIDE, LLAMA_SERVER, LLAMA_CPP_SERVER):
        reply = asking(REPLY, CHAT, peer, LABELS, (1, 9))
        assert reply is not None
        assert reply[1]["max_tokens"] == 64
        assert "ignore_eos" in reply[1] or reply[1]["logit_bias"] == {"1": -100, "9": -100}
        assert asking(FEW_SHOT, COMPLETION, peer, LABELS) == (
            "completions",
            {"temperature": 0, "max_tokens": 12, "stop": ["\n"]},
        )


def test_a_grammar_quotes_what_would_end_it() -> None:
    assert gbnf(['a"b', "c\\d"]) == r'root ::= "a\"b" | "c\\d"'


def test_slices_are_disjoint_and_of_nearly_the_same_length() -> None:
    dealt = deal(POOL, {"a": (3, 10), "b": (2, 5)}, seed=1)
    assert [len(part) for part in dealt["a"]] == [10, 10, 10]
    used = [example.id for parts in dealt.values() for part in parts for example in part]
    assert len(used) == len(set(used)) == 40
    totals = [sum(len(example.text) for example in part) for part in dealt["a"]]
    assert max(totals) - min(totals) < 0.1 * max(totals)
    assert dealt == deal(POOL, {"a": (3, 10), "b": (2, 5)}, seed=1)
    with pytest.raises(BadWorkload, match="need 61 different texts, there are 60"):
        deal(POOL, {"a": (61, 1)}, seed=1)


def test_long_prompts_are_made_of_different_mails() -> None:
    mails = [LabelledExample(str(n), f"mail {n} " * 20, "ham") for n in range(40)]
    prompts = long_prompts(mails, 1000)
    assert {len(prompt.text) for prompt in prompts} == {1000}
    assert len({prompt.text[:50] for prompt in prompts}) == len(prompts) >= 5
    assert {prompt.label for prompt in prompts} == {""}


@pytest.mark.parametrize("settings", [PeerSettings(), PeerSettings(quick=True).effective()])
def test_the_mails_there_are_suffice_and_none_is_used_twice_by_one_server(settings: PeerSettings) -> None:
    labels, slices, warmup, offline = deal_examples(settings)
    assert len(labels) == 8
    for family in ((LABEL, LABEL_ALONE), (REPLY, REPLY_ALONE), (FEW_SHOT,)):
        texts = [e.text for (task, _), parts in slices.items() if task in family for part in parts for e in part]
        assert len(texts) == len(set(texts))
        assert not set(texts) & {example.text for example in warmup}
    assert len({example.id for example in offline}) == settings.offline
    assert {len(parts) for parts in slices.values()} == {settings.repetitions}


def test_quick_changes_only_what_was_not_given() -> None:
    given = PeerSettings(quick=True, requests=5).effective()
    assert (given.requests, given.burst) == (5, 24)


def plan(name: str, peer: str = LLAMA_SERVER, *, once: bool = False) -> ServerPlan:
    facts = Server(name=name, profile="best", settings="", quantization="Q8_0", size_bytes=1, sha256="0" * 64)
    return ServerPlan(facts, peer, lambda log: nullcontext(RunningServer("", 0.0)), once=once)


def test_passes_alternate_between_servers_and_reverse_with_each_repetition() -> None:
    servers = (plan("ours", DESKSIDE), plan("best"), plan("slow", once=True))
    stage = Stage(servers, [(tasks(4)[LABEL], frozenset({"ours", "best", "slow"}))], PromptTemplate("bare"), ())
    order = list(planned_passes(stage, PeerWorkload({}, LABELS, 2)))
    shown = [(turn.repetition, turn.way, turn.plan.name) for turn in order]
    assert shown == [
        (0, CHAT, "ours"), (0, CHAT, "best"), (0, CHAT, "slow"),
        (0, CONSTRAINED, "slow"), (0, CONSTRAINED, "best"), (0, CONSTRAINED, "ours"),
        (0, DECISIONS, "ours"),
        (1, CHAT, "best"), (1, CHAT, "ours"),
        (1, CONSTRAINED, "ours"), (1, CONSTRAINED, "best"),
        (1, DECISIONS, "ours"),
    ]  # fmt: skip


def test_batch_lines_ask_as_over_http_and_answers_come_back_in_order() -> None:
    mails = [LabelledExample("a", "hi", "ham"), LabelledExample("b", "buy", "spam")]
    chat, decision = (json.loads(batch_lines(mails, way, LABELS).splitlines()[0]) for way in (CONSTRAINED, DECISIONS))
    assert (chat["custom_id"], chat["url"], chat["body"]["choice"]) == ("a", "/v1/chat/completions", ["ham", "spam"])
    assert (decision["url"], decision["body"]["input"]) == ("/v1/decisions", "hi")
    second = {"custom_id": "b", "response": {"body": {"choices": [{"message": {"content": " spam"}}]}}}
    first = {"custom_id": "a", "response": {"body": {"answers": [{"choice": "ham"}]}}}
    assert batch_answers(f"{json.dumps(second)}\n{json.dumps(first)}\n", mails) == ["ham", "spam"]
    with pytest.raises(KeyError):
        batch_answers(json.dumps(first), mails)


def test_counters_are_read_from_prometheus_text() -> None:
    text = '# HELP a x\n# TYPE a counter\na_total 1.5\nb 2\nc{model="x"} 3\nc{model="y"} 4\n'
    assert read_counters(text, ("a_total", "c", "d")) == {"a_total": 1.5, "c": 7.0}


def test_one_entry_of_a_lock_file_is_left_out_with_its_hashes() -> None:
    lock = "a==1 \\\n    --hash=sha256:1 \\\n    --hash=sha256:2\nb==2 \\\n    --hash=sha256:3\n"
    assert without(lock, "a") == "b==2 \\\n    --hash=sha256:3\n"
    with pytest.raises(ValueError, match="one entry of 'c'"):
        without(lock, "c")


def test_the_lock_file_pins_every_peer_and_names_no_index() -> None:
    lock = Path(str(Path(__file__).parents[3] / "benchmarks" / "peers.lock")).read_text(encoding="utf-8")
    for name in ("ctranslate2", "xllamacpp", "llama-cpp-python", "gguf", "ik-llama-cpp-python"):
        assert f"\n{name}==" in f"\n{lock}"
    assert "http" not in lock
