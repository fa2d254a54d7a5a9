"""Hosted calls: the cap on what they may cost, and the file that keeps them to be given back later.

Before a call the most that it can cost is set aside: every byte that is sent counts as a token until answers have shown
how many bytes a token has, and the answer counts as long as it may get. What was set aside is then replaced by
the tokens that the API counted; a call that names none keeps its full price.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.cost import CallPrice
from benchmarks.errors import BadRecord, BadWorkload
from benchmarks.record import RequestSample, load_record, save_json
from models.common.record import Record

from .record import WayAnswer

# Texts differ in bytes a token: this much is added to the densest one seen.
RESERVE = 1.25


class SpendingCap:
    """The dollars that hosted calls may cost, all runs into one result file together."""

    def __init__(self, max_usd: float, price: CallPrice, earlier: Iterable[WayAnswer] = ()) -> None:
        self.max_usd = max_usd
        self.price = price
        self.spent_usd = sum(cost_of(answer, price) for answer in earlier)
        self.n_refused = 0
        self._reserved_usd = 0.0
        self._densest = 1.0
        self._seen = 0

    def reserve(self, n_bytes: int, limit: int) -> float | None:
        """Set the most aside that the call can cost; None if that is more than is left."""
        # A few answers before their density is trusted.
        tokens = n_bytes if self._seen < 3 else min(n_bytes, round(n_bytes * self._densest * RESERVE) + 1)
        most = self.price.of(tokens, limit)
        if self.spent_usd + self._reserved_usd + most > self.max_usd:
            self.n_refused += 1
            return None
        self._reserved_usd += most
        return most

    def settle(self, reserved: float, n_bytes: int, sample: RequestSample) -> None:
        """Replace what was set aside by what the call cost. A call refused before it began costs nothing."""
        self._reserved_usd -= reserved
        if sample.retry_after_s is not None:
            return
        if sample.prompt_tokens is None or sample.completion_tokens is None:
            self.spent_usd += reserved
            return
        self.spent_usd += self.price.of(sample.prompt_tokens, sample.completion_tokens, sample.cached_tokens or 0)
        density = sample.prompt_tokens / max(1, n_bytes)
        self._densest = max(self._densest, density) if self._seen else density
        self._seen += 1


def cost_of(answer: WayAnswer, price: CallPrice) -> float:
    """Dollars that a kept answer has cost, by the tokens that the API counted."""
    return price.of(answer.prompt_tokens or 0, answer.completion_tokens or 0, answer.cached_tokens or 0)


def read_price(given: str | None) -> CallPrice | None:
    """`--price IN,OUT`, dollars per million tokens. Raises BadWorkload."""
    if given is None:
        return None
    try:
        prompt, completion = (float(part) for part in given.split(","))
    except ValueError as error:
        raise BadWorkload(f"--price takes IN,OUT, $ per million tokens such as 0.10,0.40; got {given!r}") from error
    if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
        raise BadWorkload(f"--price must be of 0 or more, got {given!r}")
    return CallPrice(f"--price {given}", input=prompt, output=completion)


class HostedRecording(Record):
    """The calls to a hosted model with their timing and usage, without its key."""

    schema_version: Literal[1] = 1
    kind: Literal["hosted calls"] = "hosted calls"
    url: str
    model: str
    task: str
    recorded_at: str
    calls: tuple[WayAnswer, ...]


def save_recording(path: Path, recording: HostedRecording) -> None:
    """Write the file, whole or not at all."""
    calls = [call.model_dump(mode="json", exclude_defaults=True) for call in recording.calls]
    save_json(path, recording.model_dump(mode="json", exclude={"calls"}) | {"calls": calls})


def load_calls(path: Path) -> HostedRecording:
    """Read a recording. Raises BadRecord."""
    recording = load_record(path, HostedRecording, "holds no recorded calls of `deskside compare --record`")
    if not recording.calls:
        raise BadRecord(f"{str(path)!r} holds no call")
    return recording


def replayed_answers(recording: HostedRecording, path: Path, asked: Sequence[tuple[str, str]]) -> list[WayAnswer]:
    """The recorded answers of `asked`, (id, hash of the question). Raises BadWorkload if one is missing."""
    known = {(call.id, call.asked): call for call in recording.calls}
    missing = [one for one in asked if one not in known]
    if missing:
        ids = {call.id for call in recording.calls}
        why = (
            "the prompt, the examples shown or the answer's limit were others when it was recorded"
            if missing[0][0] in ids
            else "it was recorded with fewer examples"
        )
        raise BadWorkload(
            f"{str(path)!r} has no answer to {len(missing)} of {len(asked)} questions, such as example "
            f"{missing[0][0]!r}: {why}. Give the options of that run, or record again with --url and --record"
        )
    return [known[one] for one in asked]
