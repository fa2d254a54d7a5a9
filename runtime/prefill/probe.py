"""Stock or own: the decision of a short race at a model's first load, kept for machine, threads and file."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from models.common.files import write_atomic

MIN_GAIN = 1.05
"""Below this, the panels are not worth their memory."""
BUDGET_S = 1.0
MAX_ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Race:
    """Median milliseconds of one prompt, by llama.cpp's products and by our own."""

    stock_ms: float
    own_ms: float

    @property
    def own_wins(self) -> bool:
        """True if our own products are worth their panels."""
        return self.stock_ms >= MIN_GAIN * self.own_ms


def race(seconds: Callable[[bool], float]) -> Race:
    """Time a prompt both ways in turns, for about a second and at least once; `seconds(own)` computes it.

    One round goes before and does not count: it touches memory for the first time.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    spent = 0.0
    for number in range(MAX_ROUNDS + 1):
        for own in (False, True) if number % 2 else (True, False):
            took = seconds(own)
            spent += took
            if number > 0:
                times[own].append(took)
        if number > 0 and spent >= BUDGET_S:
            break
    return Race(1e3 * median(times[False]), 1e3 * median(times[True]))


class Decisions:
    """Finished races, one JSON file each; a file that cannot be read or written counts as none."""

    def __init__(self, folder: Path, *parts: object) -> None:
        self._folder = folder
        self._parts = parts

    def find(self, model: Path) -> Race | None:
        """The race of this file, if one was run here."""
        try:
            kept = json.loads(self._file(model).read_text(encoding="utf-8"))
            return Race(float(kept["stock_ms"]), float(kept["own_ms"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, model: Path, finished: Race) -> None:
        """Keep the race for the next load."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._file(model), json.dumps({"model": str(model), **asdict(finished)}, indent=2) + "\n")
        except OSError:
            return

    def _file(self, model: Path) -> Path:
        state = model.stat()
        text = "\0".join(map(str, (*self._parts, model.resolve(), state.st_size, state.st_mtime_ns)))
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
