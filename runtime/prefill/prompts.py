"""Prompts by our own products: a load's panels, the short race that decides about them, and `doctor`'s line."""

import ctypes
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from models.common.files import default_home, write_atomic

from .build import Host, Unavailable, find_compiler, library, require_host
from .library import OFF, Panels, add_all, matrices, open_library, panel_bytes

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


Prefill = Literal["auto", "stock", "own"]

MIN_ROWS = 32
"""Products of fewer rows are llama.cpp's: its repacked kernels are as fast there, and answers are written so."""
FEWEST_ROWS = 1
"""Of products that are ours in all prompts, however they are cut: a row's bits do not depend on the others. In the last
layer llama.cpp computes the rows only that give logits."""
FOLDER = "prefill"

_log = logging.getLogger("deskside.prefill")


class Prompts:
    """The panels of a model that is being loaded, until it is decided whether they stay."""

    def __init__(self, path: Path, panels: Panels, decisions: Decisions, *, forced: bool) -> None:
        self.panels = panels
        self._path, self._decisions, self._forced = path, decisions, forced

    def decide(self, seconds: Callable[[bool], float]) -> bool:
        """True if our own products compute prompts from now on; else the caller closes the panels.

        `seconds(own)` times one prompt; it is called where no earlier load of this file raced here.
        """
        if not self._forced:
            known = self._decisions.find(self._path)
            if known is None:
                known = race(seconds)
                self._decisions.keep(self._path, known)
            _log.info("a prompt takes %.0f ms by llama.cpp, %.0f ms by Deskside", known.stock_ms, known.own_ms)
            if not known.own_wins:
                self.panels.take_over(OFF)
                return False
        self.panels.take_over(MIN_ROWS)
        return True


def prepare(
    path: Path,
    prefill: Prefill,
    ggml: ctypes.CDLL,
    operations: Callable[[], tuple[int, int]],
    *,
    version: str,
    n_threads: int,
) -> Prompts | None:
    """Panels for the model in `path`; None where an earlier race was lost.

    `ggml` is the loaded library, of llama-cpp-python `version`; `operations()` gives the numbers of its matrix
    product and of attention, after the layout of its tensors is proved. Raises Unavailable.
    """
    folder = default_home() / FOLDER
    host = Host.here(version)
    compiled = library(folder, host)
    decisions = Decisions(folder, compiled.name, host.cpu, n_threads)
    if prefill == "auto" and (known := decisions.find(path)) is not None and not known.own_wins:
        return None
    tensors = matrices(path)
    panels = Panels(open_library(compiled, ggml, operations()))
    try:
        add_all(panels, path, tensors, n_threads)
    except BaseException:
        panels.close()
        raise
    return Prompts(path, panels, decisions, forced=prefill == "own")


def describe(version: str) -> str:
    """One line for `doctor`: whether our own products can run here, and why not. Compiles nothing."""
    try:
        require_host(Host.here(version))
        compiler = find_compiler()
    except Unavailable as error:
        return f"by llama.cpp: {error}"
    return f"by Deskside where it wins a race at a model's first load, compiled by {compiler}; else by llama.cpp"


def extra_bytes(path: Path) -> int:
    """The memory of the panels that a load of `path` may make, in bytes; 0 if it cannot be read."""
    try:
        return panel_bytes(matrices(path))
    except Unavailable:
        return 0
