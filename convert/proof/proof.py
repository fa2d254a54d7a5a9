"""The proof of a converted folder: its tokenizer and chat template give the same tokens and prompts as before.

A child process makes it, on a file of the vocabulary alone, while the weights are written: Hugging Face's tokenizer of
a large vocabulary takes seconds to load and hundreds of MiB, which the end of the process frees.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from convert.child import Child
from convert.errors import TokenizerInvalid, VerifyFailed
from convert.gguf_writer import write_head
from models.common.chat_records import ChatRecord
from models.gguf.header import Header
from models.manifest import BARE_PROMPT

if TYPE_CHECKING:
    from models.common.console import Reporter

# Each example is tokenized twice; more of them add time, not certainty.
MAX_EXAMPLES = 1000
_MAX_MESSAGE_CHARS = 20_000  # llama.cpp's tokenizer is quadratic on text that falls back to bytes

DIFFERENT, UNREADABLE = 1, 3
"""Exit codes of the child: it found a difference; it cannot load the folder's tokenizer."""


@dataclass(frozen=True)
class ProofResult:
    """The counts of what was compared and found equal, with warnings and notes for the user."""

    n_texts: int
    n_tokens: int
    n_prompts: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


class Proof:
    """The comparison in its child process. Close it when done."""

    def __init__(self, folder: Path, template: Path | None = None) -> None:
        """Start the child, which loads the tokenizer of `folder`; `template` is the chat template's, if another."""
        job = {"folder": str(folder), "template": str(template or folder)}
        self._child = Child("convert.proof.proof_child", job)
        self._result: Path | None = None
        self._left_out: tuple[str, ...] = ()

    def close(self) -> None:
        """Kill the child if it still runs. Closing twice is harmless."""
        self._child.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def begin(self, header: Header, records: tuple[ChatRecord, ...], workdir: Path) -> None:
        """Start comparing with llama.cpp's tokenizer of `header`, on the built-in texts and the user's `records`."""
        vocabulary, self._result = workdir / "vocabulary.gguf", workdir / "proof.json"
        write_head(vocabulary, header.fields, header.alignment)
        shown = [record for record in records if _is_short(record)][:MAX_EXAMPLES]
        n_long = sum(not _is_short(record) for record in records)
        self._left_out = tuple(_left_out(len(records), n_long, len(shown)))
        texts = [message.content for record in shown for message in record.prompt] + [one.answer for one in shown]
        conversations = [
            BARE_PROMPT.messages((message.role, message.content) for message in record.prompt) for record in shown
        ]
        job = {"vocabulary": str(vocabulary), "texts": texts, "conversations": conversations}
        self._child.give(job | {"result": str(self._result)})

    def check(self, report: "Reporter") -> None:
        """Raise as `end` does if the comparison has failed already; does not wait."""
        if self._child.has_failed:
            self.end(report)

    def end(self, report: "Reporter") -> None:
        """Wait for the result and report it. Raises VerifyFailed with the first difference, TokenizerInvalid."""
        assert self._result is not None, "begin() comes first"
        report.stage("compare the tokenizer with Hugging Face's")
        code, complaint = self._child.wait(report.advance)
        if code == UNREADABLE:
            raise TokenizerInvalid(complaint)
        if code != 0:
            end = f"the comparison ended with {signal.Signals(-code).name}: " if code < 0 else ""
            raise VerifyFailed(f"{end}{complaint}")
        found = TypeAdapter(ProofResult).validate_json(self._result.read_bytes())
        report.note(f"tokenizer: {found.n_texts} texts have the same {found.n_tokens} tokens as in Hugging Face's")
        for warning in found.warnings:
            report.warn(warning)
        for note in (*found.notes, *self._left_out):
            report.note(note)
        if found.n_prompts:
            report.note(f"chat template: {found.n_prompts} prompts have the same text and tokens as Hugging Face's")


def _left_out(n_given: int, n_long: int, n_shown: int) -> Iterator[str]:
    """The examples that are not compared, in words."""
    if n_long:
        yield f"{n_long} of {n_given} examples are not compared: they are longer than {_MAX_MESSAGE_CHARS} characters"
    if n_more := n_given - n_long - n_shown:
        yield f"{n_more} of {n_given} examples are not compared: {n_shown} are enough"


def _is_short(record: ChatRecord) -> bool:
    return all(len(message.content) <= _MAX_MESSAGE_CHARS for message in record.prompt)
