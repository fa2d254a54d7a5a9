"""The tasks of a comparison with peers, and the request that puts each task to each peer.

No mail is used twice on one server, since a server that keeps prefixes answers a repeated mail almost for free. The
slices of one task have nearly the same lengths, so that two ways of asking can be compared across slices.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.errors import BadWorkload
from benchmarks.load.workload import LabelledExample

PeerEndpoint = Literal["chat", "completions", "decisions"]
DESKSIDE, LLAMA_SERVER, LLAMA_CPP_SERVER = "deskside", "llama-server", "llama_cpp.server"
IK_LLAMA = "ik_llama.cpp"

LABEL_TOKENS = 12
REPLY_TOKENS = 64
TURN_TOKENS = 24
# Gemma: about 300 tokens.
REPLY_CHARS = 1000
INSTRUCTIONS = "Which list was this mail sent to, or is it spam?"

LABEL, REPLY, FEW_SHOT, BURST = "label", "64-token reply", "few-shot label", "cold burst"
LABEL_ALONE, REPLY_ALONE, HOP = "label, one client", "64-token reply, one client", "one token, one client"
CONVERSATIONS = "conversations"
CHAT, CONSTRAINED, DECISIONS, COMPLETION = "chat", "constrained", "decisions", "completion"


@dataclass(frozen=True, slots=True)
class PeerTask:
    """One workload: the number of users at a time, and the ways of asking for the same answer."""

    name: str
    users: int
    ways: tuple[str, ...]


def tasks(burst: int) -> dict[str, PeerTask]:
    """All tasks by name; the users of the burst send at once."""
    made = (
        PeerTask(LABEL, 16, (CHAT, CONSTRAINED, DECISIONS)),
        PeerTask(REPLY, 16, (CHAT,)),
        PeerTask(LABEL_ALONE, 1, (CHAT, CONSTRAINED, DECISIONS)),
        PeerTask(REPLY_ALONE, 1, (CHAT,)),
        PeerTask(HOP, 1, (CHAT,)),
        PeerTask(FEW_SHOT, 16, (COMPLETION,)),
        PeerTask(BURST, burst, (COMPLETION,)),
        PeerTask(CONVERSATIONS, 1, (CHAT,)),
    )
    return {task.name: task for task in made}


def asking(
    task: str, way: str, peer: str, labels: Sequence[str], ends: Sequence[int] = ()
) -> tuple[PeerEndpoint, dict[str, Any]] | None:
    """The endpoint and the request fields for `peer`, or None when it does not offer this way.

    `ends`: the tokens that a logit bias bans on llama_cpp.server where an answer must have its full length.
    """
    greedy: dict[str, Any] = {"temperature": 0}
    if task == HOP:
        return "chat", greedy | {"max_tokens": 1}
    if task in (REPLY, REPLY_ALONE, CONVERSATIONS):
        limit = TURN_TOKENS if task == CONVERSATIONS else REPLY_TOKENS
        return "chat", greedy | {"max_tokens": limit} | _no_end(peer, ends)
    if way == COMPLETION:
        return "completions", greedy | {"max_tokens": LABEL_TOKENS, "stop": ["\n"]}
    if way == DECISIONS:
        choices = [{"value": label} for label in labels]
        questions = [{"type": "choice", "instructions": INSTRUCTIONS, "choices": choices}]
        return ("decisions", {"questions": questions}) if peer == DESKSIDE else None
    fields = greedy | {"max_tokens": LABEL_TOKENS}
    if way == CONSTRAINED:
        fields |= {"choice": list(labels)} if peer == DESKSIDE else {"grammar": gbnf(labels)}
    return "chat", fields


def _no_end(peer: str, ends: Sequence[int]) -> dict[str, Any]:
    if peer == LLAMA_CPP_SERVER:
        return {"logit_bias": {str(token): -100 for token in ends}}
    return {"ignore_eos": True}


def gbnf(labels: Sequence[str]) -> str:
    """llama.cpp's grammar for exactly one of `labels`."""
    return "root ::= " + " | ".join('"' + label.replace("\\", "\\\\").replace('"', '\\"') + '"' for label in labels)


def deal(
    pool: Sequence[LabelledExample], counts: Mapping[str, tuple[int, int]], seed: int
) -> dict[str, list[list[LabelledExample]]]:
    """{name: (slices, size)} -> disjoint slices; those of one name have nearly the same lengths.

    Raises BadWorkload when the pool is too small.
    """
    need = sum(slices * size for slices, size in counts.values())
    if need > len(pool):
        raise BadWorkload(f"the workloads need {need} different texts, there are {len(pool)}: ask for fewer requests")
    chance = random.Random(seed)
    order = chance.sample(list(pool), len(pool))
    dealt: dict[str, list[list[LabelledExample]]] = {}
    for name, (slices, size) in counts.items():
        mine, order = order[: slices * size], order[slices * size :]
        mine.sort(key=lambda example: len(example.text))
        rows = [chance.sample(mine[start : start + slices], slices) for start in range(0, len(mine), slices or 1)]
        dealt[name] = [chance.sample(column, size) for column in map(list, zip(*rows, strict=True))]
    return dealt
