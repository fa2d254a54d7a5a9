"""Training and evaluation examples: JSONL of chat records that end with the right answer.

    {"id": "…", "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

What other tools write is read too: `{"prompt": …, "completion": …}`, both a text or messages, and ShareGPT's
`{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}`.

Conversion and benchmarks share this reader: both accept the same files and refuse others with the same message.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from models.errors import BadExamples

from .file_kinds import Kind, file_kind, is_gzip

# Limits of a record, and of the unpacked file: a gzip file of a few kilobytes can hold gigabytes.
MAX_LINE_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 30
# JSON that is cut, spread over lines or malformed is judged line by line.
_READABLE: frozenset[Kind] = frozenset({"json lines", "json", "text", "gzip", "missing", "empty"})
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
# The limit of /v1/decisions: more labels cannot be served as a decision.
MAX_LABELS = 255


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """A message of a chat: the speaker's role and the text."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """An example: `prompt` (one message or more) and the `answer` to it, stripped.

    `id` is the record's own, else its line number; `line` is counted from 1.
    """

    id: str
    line: int
    prompt: tuple[ChatMessage, ...]
    answer: str


def read_chat_records(path: Path) -> tuple[ChatRecord, ...]:
    """Read a .jsonl or .jsonl.gz file in file order; empty lines are skipped.

    Raises BadExamples naming the line and what is wrong with it, or what the file is if it is something else.
    """
    given = file_kind(path)
    if given.kind not in _READABLE:
        names = sorted(one.name for one in path.glob("*.jsonl*"))[:3] if given.kind == "folder" else []
        hint = f"; give one of its files: {', '.join(names)}" if names else ""
        if command := given.to_records():
            hint = f". This makes chat records of it:\n  {command}"
        raise BadExamples(f"examples {str(path)!r} are {given.name}, not JSON lines of chat records{hint}")
    try:
        with _opened(path) as file:
            records = tuple(_record(path, number, line) for number, line in _lines(path, file))
    except (OSError, EOFError, zlib.error) as error:
        raise BadExamples(f"examples {str(path)!r} cannot be read: {error}") from error
    if not records:
        raise BadExamples(f"examples {str(path)!r} hold no record")
    seen: dict[str, int] = {}
    for record in records:
        if (earlier := seen.setdefault(record.id, record.line)) != record.line:
            message = f"line {record.line}: id {record.id!r} is that of line {earlier}; every example needs its own"
            raise BadExamples(f"examples {str(path)!r}, {message}")
    return records


def answers_repeat(answers: Sequence[str]) -> bool:
    """True if the answers look like labels: few distinct ones, each given three times or more on average."""
    return 2 <= len(set(answers)) <= min(MAX_LABELS, len(answers) // 3)


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz" or is_gzip(path):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line). Only a line feed ends a line: JSON texts may hold other line separators."""
    number = n_bytes = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        n_bytes += len(line)
        if len(line) > MAX_LINE_BYTES:
            message = f"line {number}: longer than the limit of {MAX_LINE_BYTES} bytes"
            raise BadExamples(f"examples {str(path)!r}, {message}")
        if n_bytes > MAX_FILE_BYTES:
            message = f"line {number}: the file exceeds the limit of {MAX_FILE_BYTES} bytes; a part of it suffices"
            raise BadExamples(f"examples {str(path)!r}, {message}")
        if line.strip():
            yield number, line


def _record(path: Path, number: int, line: bytes) -> ChatRecord:
    try:
        return _parsed(number, line)
    except (ValueError, RecursionError) as error:
        raise BadExamples(f"examples {str(path)!r}, line {number}: not a chat record: {error}") from error


def _parsed(number: int, line: bytes) -> ChatRecord:
    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    messages = _messages(record) if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            'expected an object {"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …} or '
            'ShareGPT\'s {"conversations": [{"from": …, "value": …}, …]}'
        )
    *prompt, answer = [_message(place, message) for place, message in enumerate(messages)]
    if answer.role != "assistant":
        raise ValueError(f"the last message must be the assistant's, who is to be measured, got role {answer.role!r}")
    if not answer.content.strip():
        raise ValueError("the assistant's answer is empty")
    if not prompt:
        raise ValueError("there is no message before the assistant's answer")
    given = record.get("id")
    return ChatRecord(str(number if given is None else given), number, tuple(prompt), answer.content.strip())


def _messages(record: Mapping[str, object]) -> object:
    """The messages of a record in any of the forms that are read."""
    if (said := record.get("messages")) is not None:
        return said
    if isinstance(turns := record.get("conversations"), list):
        return [_turn(turn) for turn in turns]
    prompt, completion = record.get("prompt"), record.get("completion")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return [*before, *after] if isinstance(before, list) and isinstance(after, list) else None


def _turn(turn: object) -> object:
    """A ShareGPT turn as a message; one that is none is left to be refused as such."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker = turn["from"]
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": turn.get("value")}


def _message(place: int, message: object) -> ChatMessage:
    if not isinstance(message, dict):
        raise ValueError(f"messages[{place}] is {type(message).__name__}, expected an object")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"messages[{place}] needs a role and a content, both text")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"messages[{place}].content holds half a surrogate pair")
    return ChatMessage(role, content)
