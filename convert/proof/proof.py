"""The proof that goes with every conversion of a folder: its tokenizer and chat template came over unchanged.

It is made by a process of its own, on a file that holds the vocabulary alone, while the weights are being written:
Hugging Face's tokenizer of a large vocabulary takes seconds to load, and hundreds of MiB that are free again with it.
"""

import signal
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from convert.child import Child
from convert.errors import TokenizerInvalid, VerifyFailed
from convert.gguf_writer import write_head
from convert.measure.examples import messages_of
from models.common.chat_records import ChatRecord
from models.common.console import Reporter
from models.gguf.header import Header

# What more than these would add is time: each is tokenised twice.
MAX_EXAMPLES = 1000
_MAX_MESSAGE_CHARS = 20_000  # llama.cpp's tokenizer is quadratic on text that falls back to bytes

DIFFERENT, UNREADABLE = 1, 3
"""Exit codes of the comparing process: a difference was found; the folder's tokenizer cannot be loaded."""


@dataclass(frozen=True)
class ProofResult:
    """What was compared and found alike, and what the user should know about it."""

    n_texts: int
    n_tokens: int
    n_prompts: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


class Proof:
    """The comparison, under way. Close it when done."""

    def __init__(self, folder: Path) -> None:
        """Begin to load the tokenizer of `folder`."""
        self._child = Child("convert.proof.proof_child", {"folder": str(folder)})
        self._result: Path | None = None

    def close(self) -> None:
        """End it, done or not. Closing twice is harmless."""
        self._child.close()

    @property
    def pid(self) -> int:
        """The id of the process that compares."""
        return self._child.pid

    def begin(self, header: Header, records: tuple[ChatRecord, ...], workdir: Path) -> None:
        """Compare it with what llama.cpp makes of `header`, on the built-in texts and the user's own `records`."""
        vocabulary, self._result = workdir / "vocabulary.gguf", workdir / "proof.json"
        write_head(vocabulary, header.fields, header.alignment)
        shown = [record for record in records[:MAX_EXAMPLES] if _is_short(record)]
        texts = [message.content for record in shown for message in record.prompt] + [one.answer for one in shown]
        conversations = [messages_of(record) for record in shown]
        told = {"vocabulary": str(vocabulary), "texts": texts, "conversations": conversations}
        self._child.give(told | {"result": str(self._result)})

    def check(self, report: Reporter) -> None:
        """Do not wait. Raises as `end` does if it has failed already."""
        if self._child.has_failed:
            self.end(report)

    def end(self, report: Reporter) -> None:
        """Wait for it and tell what was compared. Raises VerifyFailed with the first difference, TokenizerInvalid."""
        assert self._result is not None, "begun before"
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
        for note in found.notes:
            report.note(note)
        if found.n_prompts:
            report.note(f"chat template: {found.n_prompts} prompts have the same text and tokens as Hugging Face's")


def _is_short(record: ChatRecord) -> bool:
    return all(len(message.content) <= _MAX_MESSAGE_CHARS for message in record.prompt)
