"""Conversations in turn: each person comes back with a longer prompt after everybody else was answered.

The time to the first token of a person's second and later turns is measured: a server that kept the conversation
computes the new text alone. The text of a turn is mails, none of which is used twice; the answers that go back with the
next turn are the server's own, as a chat client sends them.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.errors import BadWorkload
from benchmarks.record import RequestSample

from .workload import LabelledExample, long_prompts

# About 600 tokens of Gemma's.
TURN_CHARS = 2100
# With an answer of 24 tokens and the roles a turn has less than 700; the rest is to spare.
TURN_CELLS = 800
_TURN = ", turn "


def conversation_turns(
    mails: Sequence[LabelledExample], people: int, turns: int, chars: int = TURN_CHARS
) -> list[LabelledExample]:
    """Everybody's first turn, then everybody's second, and so on. Raises BadWorkload with too few mails."""
    texts = long_prompts(mails, chars)
    if (need := people * turns) > len(texts):
        raise BadWorkload(
            f"{people} people with {turns} turns need {need} different texts, the mails suffice for {len(texts)}: "
            "use fewer --people or --turns"
        )
    return [
        LabelledExample(f"person {number % people + 1}{_TURN}{number // people + 1}", text.text, "")
        for number, text in enumerate(texts[:need])
    ]


def conversation_cells(turns: int) -> int:
    """Enough cells for one whole conversation, a multiple of 1,024."""
    return -(-turns * TURN_CELLS // 1024) * 1024


def person_and_turn(example_id: str) -> tuple[str, int]:
    """The person, and the number of the turn, from 1."""
    person, _, turn = example_id.rpartition(_TURN)
    return person, int(turn)


class Talks:
    """Everybody's conversation with one server so far. A turn that fails leaves what had arrived of its answer."""

    def __init__(self, chat: Callable[..., Awaitable[RequestSample]]) -> None:
        self._chat = chat
        self._said: dict[str, list[dict[str, str]]] = {}

    async def turn(self, example: LabelledExample, prompt: str, scheduled: float, **fields: Any) -> RequestSample:
        """Send `prompt` after all that this person and the server said before."""
        person, _ = person_and_turn(example.id)
        said = self._said.setdefault(person, [])
        said.append({"role": "user", "content": prompt})
        sample = await self._chat(example, prompt, scheduled, **fields, messages=list(said))
        said.append({"role": "assistant", "content": sample.text})
        return sample
