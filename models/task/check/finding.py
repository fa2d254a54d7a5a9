"""The nouns of a check: an example with its split, a finding, and the whole report."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from models.common.chat_records import ChatRecord
from models.common.record import Record
from models.task.task import text_of

# "mend": training on it would measure nothing true (exit 3). "look": a person should decide. "note": good to know.
Severity = Literal["mend", "look", "note"]
MAX_EXAMPLES = 5
SHOWN_CHARACTERS = 100


class RowKey(Record):
    """An example of a task: its split and its id."""

    split: str
    id: str


class Finding(Record):
    """One thing that was found. `rows` are all it concerns, `drops` those that `task apply --drop KIND` takes out."""

    kind: str
    severity: Severity
    n: int
    what: str
    examples: tuple[str, ...] = ()
    mend: str = ""
    rows: tuple[RowKey, ...] = ()
    drops: tuple[RowKey, ...] = ()


class Suspicion(Record):
    """A label that is probably wrong, with the one that the other examples suggest."""

    key: RowKey
    text: str
    label: str
    suggested: str
    confidence: float


class LearningPoint(Record):
    """A point of the learning curve: rows learned from, accuracy on the others, 95 % interval."""

    n_rows: int
    accuracy: float
    low: float
    high: float


class CheckReport(Record):
    """Everything that `task check` found, most urgent first."""

    task: str
    kind: str
    sizes: dict[str, int]
    findings: tuple[Finding, ...]
    suspicious: tuple[Suspicion, ...] = ()
    curve: tuple[LearningPoint, ...] = ()
    advice: str = ""
    word_accuracy: float | None = Field(None, description="Of the word model, out of fold")

    @property
    def must_mend(self) -> bool:
        """True if a finding makes every figure of this task untrue."""
        return any(finding.severity == "mend" for finding in self.findings)


class Example:
    """An example with its split; `text` and `answer` are read often, and so are kept."""

    __slots__ = ("answer", "key", "record", "split", "text")

    def __init__(self, split: str, record: ChatRecord) -> None:
        self.split, self.record = split, record
        self.text, self.answer = text_of(record), record.answer
        self.key = RowKey(split=split, id=record.id)

    @property
    def where(self) -> str:
        """Split and line, as messages name it."""
        return f"{self.split}:{self.record.line}"


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """A text on one line, shortened."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def keys(examples: Sequence[Example]) -> tuple[RowKey, ...]:
    """The keys of several examples."""
    return tuple(example.key for example in examples)
