"""Split of the user's examples: some calibrate the quantization, the others are held out to measure it.

A candidate must not be fitted to the examples it is judged by, so no text is on both sides. The content of an example
decides its side: the same in every run, for any order of the file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convert.tokenizer.chat_template import END_OF_TURN_FIELD, TEMPLATE_FIELD
from models.common.chat_records import MAX_LABELS, ChatRecord
from models.errors import BadExamples
from models.gguf.header import Header
from models.manifest import BARE_PROMPT, Prompt
from runtime.errors import RequestError
from runtime.llama.interface import TokenizerLike
from runtime.prompt.cut import cut_messages, spoken
from runtime.prompt.prompter import ANSWER_MARK, Prompter, input_text

# With fewer than half of this held out, confidence intervals are too wide to tell candidates apart.
MIN_EXAMPLES = 20
MAX_HELD_OUT = 200
# The model does not run on these texts, so its context does not limit them.
_ANY_LENGTH = 1 << 24


@dataclass(frozen=True, slots=True)
class Split:
    """Two sets of examples with no prompt in common. Of examples with the same prompt only the first is kept."""

    calibration: tuple[ChatRecord, ...]
    held_out: tuple[ChatRecord, ...]


def split_examples(records: Sequence[ChatRecord], max_held_out: int = MAX_HELD_OUT) -> Split:
    """Hold out at most `max_held_out` examples, and at most half; both sides are in the order of their hashes.

    Raises BadExamples when there are fewer than MIN_EXAMPLES different prompts, or `max_held_out` is below half of it.
    """
    if max_held_out < MIN_EXAMPLES // 2:
        raise BadExamples(f"at least {MIN_EXAMPLES // 2} examples must be held out, got a limit of {max_held_out}")
    different: dict[bytes, ChatRecord] = {}
    for record in records:
        different.setdefault(_digest(record), record)
    if len(different) < MIN_EXAMPLES:
        raise BadExamples(
            f"the examples hold {len(different)} different prompts in {len(records)} records; at least {MIN_EXAMPLES} "
            "are needed, half of them to measure with"
        )
    ordered = [different[digest] for digest in sorted(different)]
    n_held_out = min(max_held_out, len(ordered) // 2)
    return Split(tuple(ordered[n_held_out:]), tuple(ordered[:n_held_out]))


def labels_of(records: Sequence[ChatRecord], known: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels to choose from: `known` (a manifest's), else every answer of the records, sorted.

    Raises BadExamples when an answer is none of the known ones, or when there are fewer than two labels or more than
    MAX_LABELS.
    """
    for record in records:
        if known and record.answer not in known:
            raise BadExamples(
                f"line {record.line}: the answer {record.answer!r} is none of the model's {len(known)} labels: "
                f"{', '.join(map(repr, known))}"
            )
    labels = tuple(known) or tuple(sorted({record.answer for record in records}))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise BadExamples(
            f"the examples have {len(labels)} different answers; to classify needs 2 … {MAX_LABELS}. "
            "Is the work to write (--for write)?"
        )
    return labels


def json_is_compact(records: Sequence[ChatRecord]) -> bool | None:
    """True if most answers in JSON have no white space after their commas and colons; None without such answers."""
    votes = [written for record in records if (written := _written_compactly(record.answer)) is not None]
    return sum(votes) * 2 > len(votes) if votes else None


def _written_compactly(answer: str) -> bool | None:
    if not answer.startswith(("{", "[")):
        return None
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    ways = [json.dumps(value, ensure_ascii=False, separators=marks) for marks in ((", ", ": "), (",", ":"))]
    return None if ways[0] == ways[1] else len(answer) <= len(ways[1])


def prompt_of(records: Sequence[ChatRecord]) -> Prompt:
    """The prompt that all records share: their system message, and the words around the user's own text."""
    systems = {record.prompt[0].content if record.prompt[0].role == "system" else "" for record in records}
    system = systems.pop() if len(systems) == 1 else ""
    asked = [[message.content for message in record.prompt if message.role != "system"] for record in records]
    texts = sorted({said[0] for said in asked})
    if len(texts) < 2 or any(len(said) != 1 for said in asked):
        return Prompt(system=system)
    before = _words(_common_start(texts[0], texts[-1]))
    rests = sorted(text[len(before) :][::-1] for text in texts)
    after = _words(_common_start(rests[0], rests[-1]))[::-1]
    if "{text}" in before + after:
        return Prompt(system=system)
    return Prompt(template=before + "{text}" + after, system=system)


def _common_start(first: str, last: str) -> str:
    """The characters that the first and the last of sorted texts, and so all of them, begin with."""
    shared = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), None)
    return first[: min(len(first), len(last)) if shared is None else shared]


def _words(shared: str) -> str:
    """`shared` up to its last whole word; nothing without a word: marks that happen to be the same are the text's."""
    while shared and shared[-1].isalnum():
        shared = shared[:-1]
    return shared if any(character.isalpha() for character in shared) else ""


def prompts_of(
    header: Header, tokenizer: TokenizerLike, records: Sequence[ChatRecord], prompt: Prompt = BARE_PROMPT
) -> list[str]:
    """The records as prompts, up to the model's answer, in the chat template of `header`, if it has one.

    Raises BadExamples naming the line that the template refuses.
    """
    field = header.fields.get(TEMPLATE_FIELD)
    template = field.value if field is not None and isinstance(field.value, str) else None
    prompter = Prompter(tokenizer, template, _ANY_LENGTH)
    prompts = []
    for record in records:
        try:
            said = messages_of(record, prompt, tokenizer)
            if template is None:
                prompts.append(input_text(spoken(said)) + ANSWER_MARK)
            else:
                prompts.append(prompter.render(said))
        except RequestError as error:
            raise BadExamples(f"line {record.line}: {error}") from error
    return prompts


def texts_of(
    header: Header, tokenizer: TokenizerLike, records: Sequence[ChatRecord], prompt: Prompt = BARE_PROMPT
) -> list[str]:
    """The records as prompt, answer and end-of-turn token. Raises BadExamples as `prompts_of`."""
    end = _end_mark(header)
    prompts = prompts_of(header, tokenizer, records, prompt)
    return [prompt + record.answer + end for prompt, record in zip(prompts, records, strict=True)]


def messages_of(record: ChatRecord, prompt: Prompt, tokenizer: TokenizerLike) -> Sequence[Mapping[str, object]]:
    """The record's prompt as messages, in the form of `prompt`, its text as long as the model reads."""
    said = prompt.messages((message.role, message.content) for message in record.prompt)
    return cut_messages(said, prompt, tokenizer).messages


def _digest(record: ChatRecord) -> bytes:
    said = [[message.role, message.content.strip()] for message in record.prompt]
    return hashlib.sha256(json.dumps(said).encode()).digest()


def _end_mark(header: Header) -> str:
    field = header.fields.get(END_OF_TURN_FIELD)
    tokens = header.fields["tokenizer.ggml.tokens"].strings or []
    if field is None or not isinstance(field.value, int) or not 0 <= field.value < len(tokens):
        return ""
    return tokens[field.value].decode(errors="replace")
