"""The kinds of work behind one interface: `Writer` generates text, `Scorer` weighs choices, `Embedder` makes vectors.

The engine keeps one `Job` for each type of request and asks only that one. Jobs that compute sequences also are their
`Owner` (`runtime/scheduling/plan.py`), so that a step's logits find their way back without a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from runtime.requests import MAX_SCORED_CHOICES

RequestT = TypeVar("RequestT", contravariant=True)

# Arrival numbers that one prompt may give its sequences: its own, and one for each choice that may fork off.
ARRIVALS = MAX_SCORED_CHOICES + 1


@dataclass(slots=True)
class TokenCounts:
    """Tokens of all requests since the engine began; `cached` of the `prompt` tokens were never computed."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


class Job(Protocol[RequestT]):
    """All live requests of one type."""

    @property
    def live(self) -> Mapping[str, object]:
        """The requests without a terminal event yet, by id."""

    def check(self, request: RequestT) -> None:
        """Raise InvalidRequest or ContextTooLong for a request that the edge should have refused."""

    def add(self, request: RequestT) -> None:
        """Begin a request that was checked. Raises InvalidRequest if its grammar cannot be used."""

    def drop(self, request_id: str) -> None:
        """Forget a live request; its cells are free with the next edits."""

    def clear(self) -> None:
        """Forget all requests of an engine that is dead."""
