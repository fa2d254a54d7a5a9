"""When an engine that ended is followed by another one, and when to give up."""

import time
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Give up after `deaths` within `window_s` with no answer finished in between.

    A request that kills its engine costs two of them, so two such requests in a row are survived. After the second
    death in a row there is a pause of `pause_s` before the next engine, and of twice as long after each that follows.
    """

    deaths: int = 5
    window_s: float = 60.0
    pause_s: float = 0.5


class Deaths:
    """The engines that ended since one of them finished an answer."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._times_s: deque[float] = deque(maxlen=policy.deaths)

    def note(self) -> None:
        """One more."""
        self._times_s.append(time.monotonic())

    def forget(self) -> None:
        """An answer was finished: the engine can work."""
        self._times_s.clear()

    @property
    def hopeless(self) -> bool:
        """Whether engines end one after the other and finish nothing."""
        many = len(self._times_s) == self._policy.deaths
        return many and self._times_s[-1] - self._times_s[0] <= self._policy.window_s

    @property
    def pause_s(self) -> float:
        """How long to wait before the next engine: not at all after the first death."""
        repeated = len(self._times_s) - 1
        return self._policy.pause_s * 2.0 ** (repeated - 1) if repeated > 0 else 0.0
