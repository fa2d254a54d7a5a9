"""A supervisor seen from outside: the requests it accepted, the events it delivered, and what was cancelled."""

from collections.abc import Callable, Iterable

from runtime.requests import Event, TextDelta, Work
from runtime.worker.inflight import Stream
from runtime.worker.process import EngineProcess
from runtime.worker.supervisor import EngineSupervisor, SupervisorLimits


class ObservedSupervisor(EngineSupervisor):
    """Adds what it accepts to `submitted`, and tells each of its `observers` what happens."""

    def __init__(self, process: EngineProcess, limits: SupervisorLimits, submitted: list[Work]) -> None:
        super().__init__(process, limits=limits, make_stream=self._observed_stream)
        self.observers: list[Observed] = []
        self._submitted = submitted

    def submit(self, *requests: Work, whole: bool = False) -> Stream:
        stream = super().submit(*requests, whole=whole)
        self._submitted += requests
        # The loop that runs this delivers the events, so none can have been delivered yet.
        for observer in self.observers:
            observer.events |= {request.id: [] for request in requests}
        return stream

    def cancel(self, request_ids: Iterable[str]) -> None:
        request_ids = tuple(request_ids)
        super().cancel(request_ids)
        for observer in self.observers:
            observer.cancelled += [name for name in request_ids if name in observer.events and not observer.ends(name)]

    def _observed_stream(
        self, request_ids: Iterable[str], cancel: Callable[[tuple[str, ...]], None]
    ) -> "_ObservedStream":
        return _ObservedStream(request_ids, cancel, self.observers)


class _ObservedStream(Stream):
    def __init__(
        self, request_ids: Iterable[str], cancel: Callable[[tuple[str, ...]], None], observers: list["Observed"]
    ) -> None:
        super().__init__(request_ids, cancel)
        self._observers = observers

    def put(self, event: Event) -> None:
        for observer in self._observers:
            if event.request_id in observer.events:
                observer.events[event.request_id].append(event)
        super().put(event)


class Observed:
    """Watches `supervisor`, an ObservedSupervisor, from now on.

    `events` holds, for each accepted request, the events that reached its stream; `cancelled` the ids of requests that
    were cancelled while they had no end, in that order.
    """

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self.events: dict[str, list[Event]] = {}
        self.cancelled: list[str] = []
        assert isinstance(supervisor, ObservedSupervisor)
        supervisor.observers.append(self)

    def ends(self, request_id: str) -> list[Event]:
        """The terminal events of a request, of which there must be one in the end."""
        return [event for event in self.events[request_id] if not isinstance(event, TextDelta)]
