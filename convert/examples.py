"""The user's examples as conversion needs them: some to calibrate the quantization with, others held out to measure it.

What a candidate is judged by it must not have been fitted to, so no text stands on both sides. Which side one comes to
is decided by its content: the same in every run, and whatever the order of the file.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from models.common.chat_records import ChatRecord
from models.errors import BadExamples

# With fewer held out than half of this, an interval says nothing.
MIN_EXAMPLES = 20
MAX_HELD_OUT = 200
# What /v1/decisions takes: more labels than that cannot be served as a decision.
MAX_LABELS = 255


@dataclass(frozen=True, slots=True)
class Split:
    """Examples with no prompt in common. `n_repeated` were left out, since their prompt had occurred before."""

    calibration: tuple[ChatRecord, ...]
    held_out: tuple[ChatRecord, ...]
    n_repeated: int = 0


def split_examples(records: Sequence[ChatRecord], max_held_out: int = MAX_HELD_OUT) -> Split:
    """Hold out at most `max_held_out` examples, and at most half; both sides in the order of their hashes.

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
    return Split(tuple(ordered[n_held_out:]), tuple(ordered[:n_held_out]), len(records) - len(different))


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


def _digest(record: ChatRecord) -> bytes:
    said = [[message.role, message.content.strip()] for message in record.prompt]
    return hashlib.sha256(json.dumps(said).encode()).digest()
