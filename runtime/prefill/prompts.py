"""Prompts by our own products: what a model's load does about them, and what `doctor` tells of them."""

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from models.common.files import default_home

from .build import Host, Unavailable, find_compiler, library, require_host
from .library import OFF, Panels, open_library
from .probe import Decisions, race
from .weights import add_all, matrices, panel_bytes

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
    path: Path, prefill: Prefill, ggml: ctypes.CDLL, mul_mat: Callable[[], int], *, version: str, n_threads: int
) -> Prompts | None:
    """Panels for the model in `path`; None where an earlier race was lost.

    `ggml` is the loaded library, of llama-cpp-python `version`; `mul_mat()` gives the number of its operation, after
    the layout of its tensors is proved. Raises Unavailable.
    """
    folder = default_home() / FOLDER
    host = Host.here(version)
    compiled = library(folder, host)
    decisions = Decisions(folder, compiled.name, host.cpu, n_threads)
    if prefill == "auto" and (known := decisions.find(path)) is not None and not known.own_wins:
        return None
    tensors = matrices(path)
    panels = Panels(open_library(compiled, ggml, mul_mat()))
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
