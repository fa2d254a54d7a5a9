"""The workload: labelled mails, the prompts around them, and the mails of each concurrency level.

A server that shares prefixes answers a repeated prompt almost for free, so no mail is used twice in one arm: the levels
take disjoint slices of the split, and a split that is too small is refused.

In a conversation each person comes back with a longer prompt after everybody else was answered, and the time to the
first token of the second and later turns is measured: a server that kept the conversation computes the new text alone.
The text of a turn is mails; the answers that go back with the next turn are the server's own, as a chat client sends
them.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BadWorkload
from benchmarks.record import RequestSample
from models.common.chat_records import ChatRecord, answers_repeat, read_chat_records
from models.common.file_kinds import file_kind
from models.errors import BadExamples
from models.manifest import Prompt

# The second is that of earlier versions, which knew mails only.
PLACEHOLDERS = ("{text}", "{mail}")
# Answers of at most this many bytes are labels or the like: no token is shorter than a byte.
SHORT_ANSWER_BYTES = 64
Said = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text and its right answer. `before` is what was said before the text, as (role, text)."""

    id: str
    text: str
    label: str
    before: Said = ()


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt around a text: `before` + text + `after`. Both empty: the bare text. `system` is a system message."""

    name: str
    before: str = ""
    after: str = ""
    system: str = ""

    def render(self, text: str) -> str:
        """The whole prompt for `text`; what the text begins or ends with already is not put around it again."""
        before = "" if text.startswith(self.before) else self.before
        return f"{before}{text}{'' if text.endswith(self.after) else self.after}"

    def said_before(self, example: LabelledExample) -> Said:
        """The messages before the user's: the example's own, after `system` unless it has a system message."""
        own = any(role == "system" for role, _ in example.before)
        return example.before if own or not self.system else (("system", self.system), *example.before)

    def shared_share(self, examples: Sequence[LabelledExample]) -> float:
        """The share of the prompts' characters that precede the text, over all `examples`."""
        return len(self.before) * len(examples) / sum(len(self.render(example.text)) for example in examples)


def read_prompt(path: Path, name: str | None = None) -> PromptTemplate:
    """Read a prompt file that holds `{text}` exactly once. Raises BadWorkload if not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        given = file_kind(path)
        if given.kind not in {"missing", "text"}:
            raise BadWorkload(f"prompt file {str(path)!r} is {given.name}, not a text in UTF-8") from error
        raise BadWorkload(f"prompt file {str(path)!r} cannot be read: {error}") from error
    if (count := sum(map(text.count, PLACEHOLDERS))) != 1:
        raise BadWorkload(f"prompt file {str(path)!r} must hold {PLACEHOLDERS[0]} exactly once, found {count} times")
    before, after = text.split(next(mark for mark in PLACEHOLDERS if mark in text))
    return PromptTemplate(name or path.stem, before, after.rstrip("\n"))


def template_prompt(name: str, prompt: Prompt) -> PromptTemplate:
    """The prompt of a manifest, its template split at its one `{text}`."""
    before, _, after = prompt.template.partition("{text}")
    return PromptTemplate(name, before, after, prompt.system)


def read_examples(path: Path) -> tuple[LabelledExample, ...]:
    """Read chat records (`{"messages": […, user, assistant]}`, .jsonl or .jsonl.gz) in file order.

    The id is the record's own or its line number. Raises BadWorkload with the line and its fault.
    """
    try:
        records = read_chat_records(path)
    except BadExamples as error:
        raise BadWorkload(str(error)) from error
    return tuple(labelled(record, path) for record in records)


def labelled(record: ChatRecord, path: Path) -> LabelledExample:
    """The record as a text and its answer. Raises BadWorkload if what is to be answered is not the user's."""
    *before, asked = [(message.role, message.content) for message in record.prompt]
    if asked[0] != "user":
        raise BadWorkload(
            f"examples {str(path)!r}, line {record.line}: before the assistant's answer comes the user's message, "
            f"got role {asked[0]!r}"
        )
    return LabelledExample(record.id, asked[1], record.answer, tuple(before))


def labels_of(examples: Sequence[LabelledExample], *, classifies: bool = False) -> tuple[str, ...]:
    """The labels of `examples`, sorted; none if the answers do not repeat, as where texts are written.

    `classifies`: the model is known to answer with labels, however few examples there are of each.
    """
    answers = [example.label for example in examples]
    return tuple(sorted(set(answers))) if classifies or answers_repeat(answers) else ()


def answer_limit(examples: Sequence[LabelledExample]) -> int:
    """The most tokens that an answer may need, by the longest of `examples`.

    A token is a byte or more of a label, and two bytes or more of a text in any usual vocabulary.
    """
    n_bytes = max(len(example.label.encode()) for example in examples)
    return n_bytes + 4 if n_bytes <= SHORT_ANSWER_BYTES else max(SHORT_ANSWER_BYTES + 4, n_bytes // 2 + 4)


@dataclass(frozen=True, slots=True)
class DrawnExamples:
    """The examples of each concurrency level, and those that only warm servers up. All different."""

    levels: dict[int, tuple[LabelledExample, ...]]
    warmup: tuple[LabelledExample, ...]


def draw(
    examples: Sequence[LabelledExample], concurrency: Sequence[int], per_level: int, warmup: int, seed: int
) -> DrawnExamples:
    """Draw `per_level` examples for each concurrency and `warmup` more, without replacement, the same for one seed.

    Raises BadWorkload when there are too few examples, or a level or text occurs twice.
    """
    if not concurrency or len(set(concurrency)) != len(concurrency) or min(concurrency) < 1 or per_level < 1:
        raise BadWorkload(f"need different levels of 1 or more, got {list(concurrency)} with {per_level} requests each")
    if (need := per_level * len(concurrency) + warmup) > len(examples):
        most = max(0, len(examples) - warmup) // len(concurrency)
        raise BadWorkload(
            f"{len(concurrency)} levels of {per_level} requests and {warmup} to warm up need {need} different "
            f"examples, the split holds {len(examples)}: use --requests {most} or fewer levels"
        )
    if len({example.text for example in examples}) != len(examples):
        raise BadWorkload("the examples hold the same text twice: a prompt would be reused")
    order = list(examples)
    random.Random(seed).shuffle(order)
    ends = range(per_level, per_level * len(concurrency) + 1, per_level)
    levels = {level: tuple(order[end - per_level : end]) for level, end in zip(concurrency, ends, strict=True)}
    return DrawnExamples(levels, tuple(order[need - warmup : need]))


def long_prompts(examples: Sequence[LabelledExample], chars: int) -> tuple[LabelledExample, ...]:
    """Prompts of `chars` characters, each of different mails; they have no right answer."""
    prompts: list[LabelledExample] = []
    text = ""
    for example in examples:
        text += f"{example.text}\n\n"
        if len(text) >= chars:
            prompts.append(LabelledExample(f"long-{len(prompts)}", text[:chars], ""))
            text = ""
    return tuple(prompts)


# About 1,100 tokens of Gemma's.
FEW_SHOT_CHARS = 3700
# The mail to label is cut: 25 tokens or so.
ASKED_CHARS = 100


def few_shot_prompts(
    mails: Sequence[LabelledExample], count: int, seed: int, chars: int = FEW_SHOT_CHARS
) -> list[LabelledExample]:
    """`count` prompts of `chars` characters: examples with their labels, then a mail to label.

    Each begins with an example of its own, so that two have no more than a few tokens in common. Raises BadWorkload
    with too few mails.
    """
    if count > len(mails):
        raise BadWorkload(f"{count} prompts need as many mails, there are {len(mails)}: use fewer --prompts")
    chance = random.Random(seed)
    order = chance.sample(list(mails), len(mails))
    return [
        LabelledExample(f"few-shot {number + 1}", _few_shot(order[number:] + order[:number], chars), "")
        for number in range(count)
    ]


def _few_shot(mails: Sequence[LabelledExample], chars: int) -> str:
    end = f"\n\nMail:\n{mails[-1].text[:ASKED_CHARS]}\nList:"
    shown = ""
    for mail in mails[:-1]:
        if len(shown) >= chars:
            break
        shown += f"Mail:\n{mail.text}\nList: {mail.label}\n\n"
    return shown[: chars - len(end)] + end


def short_prompts(mails: Sequence[LabelledExample], count: int, chars: int = 200) -> list[LabelledExample]:
    """`count` prompts that differ from their first tokens on: a number, and the beginning of a mail."""
    return [
        LabelledExample(f"short {number}", f"{number}. {mails[number % len(mails)].text[:chars]}", "")
        for number in range(1, count + 1)
    ]


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
