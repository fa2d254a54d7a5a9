"""The record of a comparison of ways, and the answers kept while it is made.

Every answer that a model gave is kept as it came. Until a way is finished its answers lie in a journal beside the
result, one line each: a run that is killed loses those in flight only.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from benchmarks.errors import BadRecord
from benchmarks.record import MachineRecord, load_record, save_json
from models.common.record import Record

Part = Literal["validation", "test", "again"]
"""The split that was asked; `again` is the test split a second time."""
JOURNAL_SUFFIX = ".journal"


class WayAnswer(Record):
    """The answer to one example. `probabilities` are of the task's labels, in their order.

    `asked`: the hash of the question, the first 16 digits. An answer to another question is asked again.
    `sent_at`: when it was asked, in seconds since 1970; `first_text_s` and `took_s` count from there. `tries` is more
    than 1 if the server had refused it. `cut`: the answer reached its limit of tokens.
    """

    id: str
    label: str
    answer: str
    asked: str = ""
    probabilities: tuple[float, ...] = ()
    cut: bool = False
    tries: int = 1
    sent_at: float | None = None
    first_text_s: float | None = None
    took_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


class WayRecord(Record):
    """One way of answering the task, and all that it answered.

    `identity` is the hash of the model and the way it is asked: answers of another identity are not mixed in. A way
    with a reason in `skipped` has none. `chosen` was chosen on the validation split. `made_s` is the time it took to
    make the way, and `made` says what that is.
    """

    name: str
    how: str
    kind: Literal["computed", "measured", "replayed"] = "measured"
    identity: str = ""
    skipped: str = ""
    made_s: float | None = None
    made: str = ""
    chosen: dict[str, float] = Field(default_factory=dict)
    model: str = ""
    sha256: str | None = None
    quantization: str | None = None
    endpoint: str = ""
    source: str = ""
    cost_usd: float | None = None
    stopped: str = ""
    answers: dict[Part, tuple[WayAnswer, ...]] = Field(default_factory=dict)


class CurvePart(Record):
    """The accuracy (of texts: the mean score) of a way with `n_examples` to learn from, over several draws."""

    way: str
    n_examples: int
    mean: float
    low: float
    high: float
    draws: int


class WayComparison(Record):
    """A comparison of ways on one task. `judgement` is derived from the answers.

    `unused` are answers of earlier runs into the same file that this one does not count: of a way that was not asked
    for, or asked differently. They are kept for a run that asks the same again.
    """

    schema_version: Literal[1] = 1
    started_at: str
    finished_at: str | None = None
    command: tuple[str, ...]
    machine: MachineRecord
    task: str
    task_kind: str
    sha256: dict[str, str]
    labels: tuple[str, ...]
    n_test: int
    n_validation: int
    quick: bool
    ways: tuple[WayRecord, ...] = ()
    unused: tuple[WayRecord, ...] = ()
    curve: tuple[CurvePart, ...] = ()
    judgement: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


def load_comparison(path: Path) -> WayComparison:
    """Read a result. Raises BadRecord naming the file and the first wrong field."""
    return load_record(path, WayComparison, "is not a comparison of ways")


def save_comparison(path: Path, comparison: WayComparison) -> None:
    """Write a result, whole or not at all; an answer's fields with their default value are left out."""
    shown = comparison.model_dump(mode="json")
    for field in ("ways", "unused"):
        shown[field] = [way.model_dump(mode="json", exclude_defaults=True) for way in getattr(comparison, field)]
    save_json(path, shown)


class KeptAnswers:
    """The answers of a result's earlier runs and of this one, by way, identity and part.

    `add` writes each to the journal before it counts. Raises BadRecord if `out` is a file of another kind.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._journal = out.with_name(out.name + JOURNAL_SUFFIX)
        self._answers: dict[tuple[str, str, Part], dict[str, WayAnswer]] = {}
        earlier = load_comparison(out) if out.exists() else None
        for way in (*earlier.unused, *earlier.ways) if earlier is not None else ():
            for part, answers in way.answers.items() if way.kind == "measured" else ():
                self.of(way.name, way.identity, part).update({one.id: one for one in answers})
        for row in self._lines():
            name, identity, part, answer = row
            self.of(name, identity, part)[answer.id] = answer
        out.parent.mkdir(parents=True, exist_ok=True)

    def of(self, name: str, identity: str, part: Part) -> dict[str, WayAnswer]:
        """The answers by example."""
        return self._answers.setdefault((name, identity, part), {})

    def others(self, name: str, identity: str) -> int:
        """The number of answers of the way under another identity: they are of no use now."""
        return sum(len(found) for key, found in self._answers.items() if key[0] == name and key[1] != identity)

    def add(self, name: str, identity: str, part: Part, answer: WayAnswer) -> None:
        """Keep an answer that has just arrived."""
        row = {"way": name, "identity": identity, "part": part, "answer": answer.model_dump(exclude_defaults=True)}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        descriptor = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        self.of(name, identity, part)[answer.id] = answer

    def save(self, comparison: WayComparison) -> None:
        """Write the result with every answer that is kept; the journal is then of no use."""
        counted = {
            (way.name, way.identity, part, one.id)
            for way in comparison.ways
            for part, answers in way.answers.items()
            for one in answers
        }
        unused: dict[tuple[str, str], dict[Part, tuple[WayAnswer, ...]]] = {}
        for (name, identity, part), answers in self._answers.items():
            if rest := tuple(one for one in answers.values() if (name, identity, part, one.id) not in counted):
                unused.setdefault((name, identity), {})[part] = rest
        records = (WayRecord(name=key[0], how="", identity=key[1], answers=rest) for key, rest in unused.items())
        save_comparison(self.out, comparison.model_copy(update={"unused": tuple(records)}))
        self._journal.unlink(missing_ok=True)

    def _lines(self) -> Iterator[tuple[str, str, Part, WayAnswer]]:
        """The journal's answers. Its last line may be torn by a kill: that answer is asked again."""
        if not self._journal.exists():
            return
        lines = self._journal.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row: Mapping[str, Any] = json.loads(line) if line.strip() else {}
                if row:
                    yield row["way"], row["identity"], row["part"], WayAnswer.model_validate(row["answer"])
            except (ValueError, KeyError, TypeError, ValidationError) as error:
                if number >= len(lines) - 1:
                    break
                raise BadRecord(
                    f"{str(self._journal)!r}, line {number}, is no answer of a comparison: {error}; delete the file "
                    "to ask those answers again"
                ) from error
