"""How long the engine spends where: seconds inside `with` blocks, added up."""

from collections.abc import Callable
from types import TracebackType


class Stopwatch:
    """`with watch:` adds the block's seconds to `total_s`, also when it raises. Not reentrant."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds and never goes back."""
        self._clock = clock
        self._began_s = 0.0
        self.total_s = 0.0

    def __enter__(self) -> None:
        self._began_s = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.total_s += self._clock() - self._began_s
