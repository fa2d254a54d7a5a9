"""What a supervisor was given and gave back, seen from outside: requests, their events, and what was cancelled."""

from collections.abc import Iterable
from typing import Any

from runtime.requests import Event, TextDelta, Work
from runtime.worker.inflight import Stream
from runtime.worker.supervisor import EngineSupervisor


class Observed:
    """Watches `supervisor` from now on.

    `events` holds, for each accepted request, the events that reached its stream; `cancelled` the ids of requests
    whose end was asked for while they had none, in that order.
    """

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self.events: dict[str, list[Event]] = {}
        self.cancelled: list[str] = []
        self._submit, self._cancel = supervisor.submit, supervisor.cancel
        supervisor.submit = self._noting_submit  # type: ignore[method-assign]
        supervisor.cancel = self._noting_cancel  # type: ignore[method-assign]

    def ends(self, request_id: str) -> list[Event]:
        """The terminal events of a request, of which there must be one in the end."""
        return [event for event in self.events[request_id] if not isinstance(event, TextDelta)]

    def _noting_submit(self, *requests: Work, **options: Any) -> Stream:
        stream = self._submit(*requests, **options)
        put = stream.put

        def noting(event: Event) -> None:
            self.events[event.request_id].append(event)
            put(event)

        # Events are put by this very loop, so none can have been put yet.
        self.events |= {request.id: [] for request in requests}
        stream.put = noting  # type: ignore[method-assign]
        return stream

    def _noting_cancel(self, request_ids: Iterable[str]) -> None:
        request_ids = tuple(request_ids)
        self._cancel(request_ids)
        self.cancelled += [request_id for request_id in request_ids if not self.ends(request_id)]
